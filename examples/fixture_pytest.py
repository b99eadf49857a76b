"""pytest: one server for the session, or a fresh one for a test that wants it."""

from collections.abc import Iterator

import psycopg
import pytest

from pgtemp import PgTempDB


@pytest.fixture(scope="session")
def server() -> Iterator[PgTempDB]:
    with PgTempDB() as db:
        yield db


@pytest.fixture
def connection(server: PgTempDB) -> Iterator[psycopg.Connection]:
    """A transaction that is rolled back."""
    with server.connect() as connection:
        yield connection
        connection.rollback()


@pytest.fixture
def fresh_url() -> Iterator[str]:
    with PgTempDB() as db:
        yield db.uri


def test_shared(connection: psycopg.Connection) -> None:
    connection.execute("CREATE TABLE account (id int PRIMARY KEY, balance numeric)")
    connection.execute("INSERT INTO account VALUES (1, 100)")
    assert connection.execute("SELECT balance FROM account").fetchone() == (100,)


def test_fresh(fresh_url: str) -> None:
    with psycopg.connect(fresh_url) as connection:
        assert connection.execute("SELECT to_regclass('account')").fetchone() == (None,)
