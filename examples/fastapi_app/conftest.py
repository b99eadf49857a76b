"""Fixtures that run the application on each test's own database."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from app import create_app
from httpx import ASGITransport, AsyncClient


@pytest.fixture(scope="session")
def pgtemp_template() -> Path:
    """Return a directory of SQL files, which are applied in the order of their names."""
    return Path(__file__).parent / "sql"


@pytest.fixture
async def client(pgtemp_uri: str) -> AsyncIterator[AsyncClient]:
    app = create_app(pgtemp_uri)
    client = AsyncClient(transport=ASGITransport(app), base_url="http://test")
    # The transport only sends requests; the lifespan opens and closes the pool.
    async with app.router.lifespan_context(app), client:
        yield client
