"""Fixtures: `create_all` builds the template; each test gets an SQLModel session on a clone."""

from collections.abc import Iterator

import pytest
from models import Hero
from sqlalchemy import Engine, make_url
from sqlmodel import Session, create_engine

from pgtemp import Recipe


def engine_of(uri: str) -> Engine:
    return create_engine(make_url(uri).set(drivername="postgresql+psycopg"))


def create_tables(uri: str) -> None:
    engine = engine_of(uri)
    Hero.metadata.create_all(engine)
    engine.dispose()


@pytest.fixture(scope="session")
def pgtemp_template() -> Recipe:
    return Recipe(create_tables, watch=["models.py"])


@pytest.fixture
def session(pgtemp_uri: str) -> Iterator[Session]:
    engine = engine_of(pgtemp_uri)
    with Session(engine) as session:
        yield session
    engine.dispose()
