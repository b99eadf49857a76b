"""pytest: each test gets a database of its own, a clone of the template."""

from collections.abc import Callable

import psycopg
import pytest

from pgtemp import Database, Recipe


def create_tables(uri: str) -> None:
    with psycopg.connect(uri) as connection:
        connection.execute("CREATE TABLE account (id int PRIMARY KEY, balance numeric)")


@pytest.fixture(scope="session")
def pgtemp_template() -> Recipe:
    # Cached on disk until this file changes. Without `watch` or `key` it is built in each run.
    return Recipe(create_tables, watch=[__file__])


def test_connection(pgtemp: Database) -> None:
    with pgtemp.connect() as connection:
        connection.execute("INSERT INTO account VALUES (1, 100)")
    # The block has committed, but the next test does not see the row.


def test_url(pgtemp_uri: str) -> None:
    with psycopg.connect(pgtemp_uri) as connection:
        connection.execute("INSERT INTO account VALUES (1, 200)")


def test_two_databases(pgtemp_factory: Callable[..., Database]) -> None:
    ours, empty = pgtemp_factory(), pgtemp_factory(template=None)
    with ours.connect() as connection:
        assert connection.execute("SELECT count(*) FROM account").fetchone() == (0,)
    with empty.connect() as connection:
        assert connection.execute("SELECT to_regclass('account')").fetchone() == (None,)


def test_going_back(pgtemp: Database) -> None:
    with pgtemp.connect() as connection:
        connection.execute("INSERT INTO account VALUES (1, 100)")
    with_one = pgtemp.snapshot("with_one")
    with pgtemp.connect() as connection:
        connection.execute("DELETE FROM account")
    pgtemp.restore(with_one)
    with pgtemp.connect() as connection:
        assert connection.execute("SELECT balance FROM account").fetchone() == (100,)


@pytest.mark.pgtemp(rollback=True)
def test_rolled_back(pgtemp: Database) -> None:
    # The cheapest kind of test: only one connection, and no new database.
    with pgtemp.connect() as connection:
        connection.execute("INSERT INTO account VALUES (1, 100)")


@pytest.mark.pgtemp(extensions=["pg_trgm"], config={"work_mem": "1MB"})
def test_extension_and_setting(pgtemp: Database) -> None:
    with pgtemp.connect() as connection:
        assert connection.execute("SELECT similarity('word', 'words') > 0.5").fetchone() == (True,)
        assert connection.execute("SHOW work_mem").fetchone() == ("1MB",)
