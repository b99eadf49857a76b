"""What goes back to the pool: a clone that nobody changed, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from conftest import need_version
from pgtemp import Cluster, Database, Template
from support import eventually

_SCHEMA = """
CREATE TABLE account (id serial PRIMARY KEY, balance numeric);
INSERT INTO account (balance) SELECT n FROM generate_series(1, 500) n;
CREATE UNLOGGED SEQUENCE counter;
CREATE MATERIALIZED VIEW total AS SELECT sum(balance) FROM account;
"""


@pytest.fixture(
    scope="module",
    params=(15, *(pytest.param(one, marks=pytest.mark.slow) for one in (16, 17)), 18),
)
def app(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Template]:
    schema = tmp_path_factory.mktemp("schema") / "schema.sql"
    schema.write_text(_SCHEMA)
    with Cluster(version=str(need_version(request.param))) as cluster:
        yield cluster.template("app", build=schema)


def goes_back(app: Template, use: Callable[[Database], object]) -> bool:
    """Whether a database is handed out again after `use`, under another name."""
    db = app.database()
    oid = directory(app, db).name
    # The proof needs its files to be older than the moment somebody got it.
    threading.Event().wait(0.05)
    db._since = time.time_ns()
    use(db)
    db.close()
    with psycopg.connect(app._server.info.uri, autocommit=True) as connection:
        query = "SELECT datname FROM pg_database WHERE oid = %s"

        def name() -> str | None:
            row = connection.execute(query, [oid]).fetchone()
            return row[0] if row is not None else None

        assert eventually(lambda: (now := name()) is None or now in app._pool._ready)
        return name() is not None


def about_it(statement: str) -> str:
    """A statement about the database that it is executed in, which has %I for its name."""
    return f"DO $$BEGIN EXECUTE format('{statement}', current_database()); END$$"


def does(*statements: str) -> Callable[[Database], object]:
    def use(db: Database) -> None:
        with psycopg.connect(db.uri, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)

    return use


@pytest.mark.parametrize(
    "statements",
    [
        [],
        [
            "SELECT * FROM account",
            "SELECT * FROM total",
            "SELECT * FROM information_schema.columns",
        ],
        ["SELECT last_value FROM counter", "BEGIN READ ONLY", "SELECT 1", "ROLLBACK"],
        ["PREPARE p AS SELECT 1", "SET work_mem = '1MB'", "LISTEN x", "SELECT pg_advisory_lock(1)"],
    ],
    ids=["connects", "reads", "reads a sequence", "session state"],
)
def test_who_only_reads_leaves_it_untouched(app: Template, statements: list[str]) -> None:
    """Where the server has pg_buffercache, by which it is proved."""
    with psycopg.connect(app._server.info.uri) as connection:
        query = "SELECT count(*) FROM pg_available_extensions WHERE name = 'pg_buffercache'"
        provable = connection.execute(query).fetchone() == (1,)
    assert goes_back(app, does(*statements)) == provable


@pytest.mark.parametrize(
    "statements",
    [
        ["INSERT INTO account (balance) VALUES (1)"],
        ["BEGIN", "DELETE FROM account", "ROLLBACK"],
        ["SELECT nextval('account_id_seq')"],
        ["SELECT nextval('counter')"],
        ["SELECT setval('counter', 5)"],
        ["CREATE TABLE t ()"],
        ["CREATE TEMP TABLE t ()"],
        ["TRUNCATE account"],
        ["REFRESH MATERIALIZED VIEW total"],
        ["SELECT * FROM account FOR UPDATE"],
        ["SELECT lo_create(0)"],
        ["SET track_counts = off", "UPDATE account SET balance = 0", "CHECKPOINT"],
        ["SET track_counts = off", "SELECT nextval('counter')"],
        ["INSERT INTO account (balance) VALUES (1)", "SELECT pg_stat_reset()"],
        [about_it("ALTER DATABASE %I SET work_mem = 1000")],
        [about_it("COMMENT ON DATABASE %I IS ''x''")],
        [about_it("GRANT CREATE ON DATABASE %I TO pg_monitor")],
        [about_it("ALTER DATABASE %I CONNECTION LIMIT 3")],
        [about_it("ALTER DATABASE %I OWNER TO pg_monitor")],
        ["ANALYZE account"],
        ["CREATE SUBSCRIPTION s CONNECTION 'dbname=x' PUBLICATION p WITH (connect = false)"],
    ],
    ids=lambda statements: statements[-1][:60],
)
def test_who_changes_anything_does_not(app: Template, statements: list[str]) -> None:
    assert not goes_back(app, does(*statements))


def test_who_is_still_connected_does_not(app: Template) -> None:
    left: list[psycopg.Connection] = []
    assert not goes_back(app, lambda db: left.append(psycopg.connect(db.uri)))
    left[0].close()


def test_one_that_was_claimed_as_it_was_made_does_not(app: Template) -> None:
    """The time of its files could not tell what was written right after."""
    for _ in range(5):  # faster than they are made ahead
        db = app.database()
        newest = max(file.stat().st_mtime_ns for file in directory(app, db).iterdir())
        db._since = newest
        db.close()
        assert eventually(lambda: db.dbname not in app._pool._ready)  # noqa: B023


def test_a_fork_is_no_clone_of_the_template(app: Template) -> None:
    with app.database() as db:
        does("DELETE FROM account")(db)
        fork = db.fork()
    threading.Event().wait(0.05)
    fork._since = time.time_ns()
    fork.close()
    assert fork.dbname not in app._pool._ready


def directory(app: Template, db: Database) -> Path:
    with psycopg.connect(app._server.info.uri) as connection:
        row = connection.execute(
            "SELECT oid FROM pg_database WHERE datname = %s", [db.dbname]
        ).fetchone()
        assert row is not None
    return app._server.data_dir / "base" / str(row[0])
