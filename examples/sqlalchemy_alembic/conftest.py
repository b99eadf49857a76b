"""Fixtures: the migrations run again only if one changes; each test starts fully migrated."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from pgtemp import Recipe

ALEMBIC_INI = Path(__file__).parent / "alembic.ini"


def migrate(uri: str) -> None:
    config = Config(ALEMBIC_INI)
    config.attributes["uri"] = uri  # for env.py; in an ini file, each % would have to be doubled
    command.upgrade(config, "head")


@pytest.fixture(scope="session")
def pgtemp_template() -> Recipe:
    return Recipe(migrate, watch=["migrations/**/*.py"])


@pytest.fixture
def engine(pgtemp_uri: str) -> Iterator[Engine]:
    engine = create_engine(make_url(pgtemp_uri).set(drivername="postgresql+psycopg"))
    yield engine
    engine.dispose()


@pytest.fixture
async def async_engine(pgtemp_uri: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(make_url(pgtemp_uri).set(drivername="postgresql+asyncpg"))
    yield engine
    await engine.dispose()
