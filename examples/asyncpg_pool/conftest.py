"""Fixtures: asyncpg builds the template, and each test gets a pool on its own database."""

from collections.abc import AsyncIterator

import asyncpg
import pytest
from queue_of_jobs import create_tables

from pgtemp import Recipe


@pytest.fixture(scope="session")
def pgtemp_template() -> Recipe:
    # Cached on disk under this key; change the key whenever the tables change.
    return Recipe(create_tables, key="1")


@pytest.fixture
async def pool(pgtemp_uri: str) -> AsyncIterator[asyncpg.Pool]:
    async with asyncpg.create_pool(pgtemp_uri, min_size=1, max_size=4) as pool:
        yield pool
