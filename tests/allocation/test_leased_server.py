"""A server that many share."""

from __future__ import annotations

import psycopg
import pytest

from pgtemp import ClusterError, PgTempDB
from pgtemp.allocation import leased_server
from pgtemp.allocation.database_allocator import DatabaseAllocator
from pgtemp.allocation.leaks import LeakCheck
from pgtemp.allocation.leased_server import LeasedServer
from pgtemp.options.server import ServerOptions
from pgtemp.server.postmaster import Postmaster
from pgtemp.sql import admin_sql, server_setup
from pgtemp.sql.admin_connections import AdminConnections
from pgtemp.sql.connection import Connection, connected
from pgtemp.templates import builder
from pgtemp.templates.recipe import Recipe
from pgtemp.uri import ConnectionInfo


def maintenance_of(db: PgTempDB) -> ConnectionInfo:
    """How pgtemp itself connects to the maintenance database of a server."""
    return ConnectionInfo(
        host=str(db.socket_dir), port=db.port, user=db.user, dbname=admin_sql.MAINTENANCE
    )


def test_what_one_thread_has_found_no_other_takes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server is found to be stale while another thread looks whether it runs, which it does."""
    plan, _ = builder.build(server_setup.plan(ServerOptions(), ()), "app", Recipe())
    made = LeasedServer(plan)
    try:
        runs = leased_server.alive

        def alive_but_stale(cluster: Postmaster) -> bool:
            made.mark_stale()
            return runs(cluster)

        assert not made.stale
        monkeypatch.setattr(leased_server, "alive", alive_but_stale)
        made.check()
        assert made.stale
    finally:
        made.stop()


def test_a_database_that_goes_while_it_is_looked_for_was_not_left() -> None:
    """It is listed, and by the time that somebody asks whose it is, it was dropped."""
    with PgTempDB() as db:
        to = maintenance_of(db)
        with (
            connected(to) as connection,
            connected(to) as other,
        ):

            def ours(name: str) -> bool:
                if name == "goes":
                    admin_sql.drop(other, name, to)
                return False

            residue = LeakCheck(db.data_dir, ours, admin_sql.BASE)
            residue.accept(connection)
            admin_sql.ensure_database(connection, "goes", db.user)
            assert residue.found(connection) == []
            admin_sql.ensure_database(connection, "stays", db.user)
            assert residue.found(connection) == [("database", "stays")]


@pytest.mark.parametrize(
    "error",
    [
        ClusterError("the server does not answer"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        OSError("input/output error"),
        RuntimeError("any other\nfault"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_server_that_cannot_be_looked_through_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """Whatever the reason, which is logged on one line; the next lease gets another server."""

    def found(residue: LeakCheck, connection: Connection) -> list[tuple[str, str]]:
        raise error

    plan, _ = builder.build(server_setup.plan(ServerOptions(), ()), "app", Recipe())
    supply = DatabaseAllocator(plan, ready=0, attributes="SUPERUSER", announce=print)
    try:
        place = supply.claim().result()
        place.lease(1)
        with monkeypatch.context() as patch:
            patch.setattr(LeakCheck, "found", found)
            supply.release(place, used=True)
        (record,) = [
            one for one in caplog.records if "the leak check after a lease failed" in one.message
        ]
        assert type(error).__name__ in record.message and "\n" not in record.message
        assert supply.claim().result().shared is not place.shared
    finally:
        supply.close()


def test_names_in_other_encodings_are_read_as_they_are() -> None:
    """A role and a database, named in a SQL_ASCII database, whose names are not UTF-8."""
    with PgTempDB() as db:
        to = maintenance_of(db)
        with connected(to) as connection:
            residue = LeakCheck(db.data_dir, lambda name: name == "ascii", admin_sql.BASE)
            residue.accept(connection)
            connection.execute(
                "CREATE DATABASE ascii ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'"
                " TEMPLATE template0"
            )
            with psycopg.connect(
                host=to.host, port=to.port, user=to.user, dbname="ascii",
                client_encoding="SQL_ASCII", autocommit=True,
            ) as other:  # fmt: skip
                other.execute(b'CREATE ROLE "r\xff"')
                other.execute(b'CREATE DATABASE "d\xff"')
            found = residue.found(connection)
            assert found == [("database", "d\udcff"), ("role", "r\udcff")]
            assert residue.clean(connection, found) == found
            assert "d\udcff" in admin_sql.databases(connection)


def test_administrative_connections_see_the_catalogs_alone() -> None:
    """Whatever search path a client has given the maintenance database or the role."""
    with PgTempDB() as db:
        to = maintenance_of(db)
        with connected(to) as connection:
            connection.execute("ALTER DATABASE postgres SET search_path = public, pg_catalog")
            connection.execute("ALTER ROLE CURRENT_USER SET search_path = public, pg_catalog")
        admins = AdminConnections(to, lambda: None)
        with admins.connection() as connection:
            assert connection.execute("SHOW search_path").fetchone() == ("pg_catalog",)
        admins.close()
