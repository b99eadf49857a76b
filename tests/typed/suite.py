"""A test suite, its conftest.py and its tests, that uses the fixtures and the mark."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, assert_type

import psycopg
import pytest

from pgtemp import Build, Cluster, Database, Recipe


def migrate(uri: str) -> None:
    psycopg.connect(uri).close()


@pytest.fixture(scope="session")
def pgtemp_template() -> Build | Recipe | None:
    return Recipe("cmd:alembic upgrade head", watch=["migrations/**/*.py"])


@pytest.fixture(scope="session")
def pgtemp_cluster() -> Iterator[Cluster]:
    with Cluster(config={"max_connections": "20"}) as cluster:
        yield cluster


@pytest.fixture
def account(pgtemp: Database) -> psycopg.Connection[Any]:
    return pgtemp.connect()


def test_connection(pgtemp: Database, pgtemp_uri: str) -> None:
    with pgtemp.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert_type(pgtemp.uri, str)
    assert pgtemp.uri == pgtemp_uri


def test_several_databases(pgtemp_factory: Callable[..., Database]) -> None:
    with pgtemp_factory() as one, pgtemp_factory(template=migrate, keep=True) as other:
        assert_type(one, Database)
        assert one.dbname != other.dbname


@pytest.mark.pgtemp(template=Path("shop.sql"), isolation="cluster", extensions=["pg_trgm"])
def test_marked(pgtemp_module: Database, account: psycopg.Connection[Any]) -> None:
    account.execute("SELECT 1")
    pgtemp_module.dump(Path("shop.sql"))
