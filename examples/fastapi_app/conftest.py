"""The application on each test's own database."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from app import create_app
from httpx import ASGITransport, AsyncClient


@pytest.fixture(scope="session")
def pgtemp_template() -> Path:
    """A directory of SQL files, applied in the order of their names."""
    return Path(__file__).parent / "sql"


@pytest.fixture
async def client(pgtemp_uri: str) -> AsyncIterator[AsyncClient]:
    app = create_app(pgtemp_uri)
    client = AsyncClient(transport=ASGITransport(app), base_url="http://test")
    # The transport sends requests only; the pool is opened and closed by the lifespan.
    async with app.router.lifespan_context(app), client:
        yield client
