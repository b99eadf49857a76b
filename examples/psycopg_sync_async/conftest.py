"""Fixtures: pools on each test's own database. pytest.ini names the template."""

from collections.abc import AsyncIterator, Iterator

import pytest
from psycopg_pool import AsyncConnectionPool, ConnectionPool


@pytest.fixture
def pool(pgtemp_uri: str) -> Iterator[ConnectionPool]:
    with ConnectionPool(pgtemp_uri, min_size=1, max_size=4) as pool:
        yield pool


@pytest.fixture
async def async_pool(pgtemp_uri: str) -> AsyncIterator[AsyncConnectionPool]:
    async with AsyncConnectionPool(pgtemp_uri, min_size=1, max_size=4) as pool:
        yield pool
