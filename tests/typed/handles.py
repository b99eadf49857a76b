"""A program that uses the synchronous handles."""

from pathlib import Path
from typing import Any, assert_type

import psycopg

import pgtemp
from pgtemp import (
    Build,
    Cluster,
    ClusterError,
    ConnectionInfo,
    Database,
    InstallationError,
    OptionError,
    PgTempDB,
    PgTempError,
    PgTempWarning,
    Recipe,
    ServerOptions,
    Snapshot,
    Template,
    TransferError,
    WardenError,
)


def migrate(uri: str) -> None:
    with psycopg.connect(uri) as connection:
        connection.execute("CREATE TABLE account (id int PRIMARY KEY, balance numeric)")


async def migrate_async(uri: str) -> int:
    return len(uri)


def one_server(data: Path) -> None:
    with PgTempDB(config={"work_mem": "64MB"}, load=data / "dump.sql", persist=True) as db:
        assert_type(db, PgTempDB)
        assert_type(db.uri, str)
        assert_type(db.port, int)
        assert_type(db.password, str | None)
        assert_type(db.data_dir, Path)
        assert_type(db.info, ConnectionInfo)
        assert_type(db.info.environment(), dict[str, str])
        with db.connect(autocommit=True) as connection:
            assert_type(connection, psycopg.Connection[Any])
            connection.execute("SELECT version()").fetchone()
        db.dump("out.sql")
        db.load(data / "in.sql")
        db.check()
        db.store(data / "stored", {db.dbname: "the whole run"})


def from_a_url() -> None:
    db = pgtemp.PgTempDB.from_uri("postgresql://me:secret@localhost:9954/testdb1", ttl=60)
    assert_type(db.start(), PgTempDB)
    db.stop()


class MyServer(PgTempDB):
    """A subclass stays one."""


def subclass() -> None:
    with MyServer(port=9954, extensions=["pg_trgm"], version="16", tcp=True, ttl=1.5) as db:
        assert_type(db, MyServer)
    assert_type(MyServer.from_uri("postgresql://localhost/app"), MyServer)


def many_databases() -> None:
    with Cluster(extensions=["pg_trgm"], data_dir_prefix=Path("/dev/shm")) as cluster:
        assert_type(cluster, Cluster)
        assert_type(cluster.server, PgTempDB)
        app = cluster.template("app", build=migrate, key="3")
        assert_type(app, Template)
        more = app.template(
            "more", ["schema.sql", Path("data"), migrate], watch=["*.py", Path("x")]
        )
        for template in (
            more,
            cluster.template("cmd", "cmd:make seed"),
            cluster.template("r", RECIPE),
        ):
            assert_type(template.name, str)
        cluster.template("async", migrate_async)
        with app.database() as db, db.connect() as connection:
            assert_type(db, Database)
            assert_type(connection, psycopg.Connection[Any])
        with cluster.database() as empty:
            before = empty.snapshot("before")
            assert_type(before, Snapshot)
            empty.restore(before)
            assert_type(empty.fork(), Database)
            assert_type(empty.psql(r"\d"), str)
            assert_type(empty.closed, bool)
            assert_type(empty.server.log_path, Path)


async def asynchronous_connection(db: Database) -> None:
    async with await db.aconnect() as connection:
        assert_type(connection, psycopg.AsyncConnection[Any])


STEPS: Build = [migrate, "schema.sql", Path("more.sql")]
RECIPE = Recipe(STEPS, key="1", watch=["migrations/*.py"], extensions=["pg_trgm"], cwd=Path("app"))
OPTIONS = ServerOptions(
    user="me", password="secret", run_as="postgres", initdb_args={"locale": "C"}
)


def errors() -> str:
    try:
        PgTempDB(version="99").start()
    except OptionError as error:
        assert_type(error.cause, str)
        value: ValueError = error
        return str(value)
    except (InstallationError, ClusterError, TransferError, WardenError) as error:
        assert_type(error.details, tuple[str, ...])
        return error.remedy
    except PgTempError as error:
        return error.cause
    return PgTempWarning.__name__
