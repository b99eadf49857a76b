"""A template that asyncpg builds, and a pool on each test's own database."""

from collections.abc import AsyncIterator

import asyncpg
import pytest
from queue_of_jobs import create_tables

from pgtemp import Recipe


@pytest.fixture(scope="session")
def pgtemp_template() -> Recipe:
    # Kept on disk under this key; change it with the tables.
    return Recipe(create_tables, key="1")


@pytest.fixture
async def pool(pgtemp_uri: str) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(pgtemp_uri, min_size=1, max_size=4) as pool:
        yield pool
