"""Leaks of a lease into a shared server that are hard to find: the next lease gets a new server."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from rawclient import Client, RefusedError
from support import Daemon, at, eventually, one

DaemonType = type[Daemon]
SERVER = "SELECT pg_postmaster_start_time()::text"
TERMINATE = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE pid <> pg_backend_pid() AND datname = 'postgres'"
)


@contextmanager
def inside(
    lease: psycopg.Connection,
    dbname: str = "postgres",
    encoding: str = "UTF8",
    replication: str = "false",
) -> Iterator[psycopg.Connection]:
    """A direct connection to a database of a lease's server, as a lease's program can open."""
    where = [str(one_of(lease, f"SHOW {name}")) for name in ("unix_socket_directories", "port")]
    with psycopg.connect(
        host=where[0], port=where[1], user="postgres", dbname=dbname,
        client_encoding=encoding, replication=replication, autocommit=True,
    ) as connection:  # fmt: skip
        yield connection


def one_of(connection: psycopg.Connection, query: str) -> object:
    row = connection.execute(query).fetchone()  # type: ignore[arg-type]
    assert row is not None
    return row[0]


def get_new_server_after(
    served: Daemon, dbname: str, *statements: bytes | str, encoding: str = "UTF8"
) -> bool:
    """Whether the next lease gets a new server after a lease executed these statements directly."""
    with psycopg.connect(at(served, "app"), autocommit=True) as lease:
        server = one_of(lease, SERVER)
        with inside(lease, dbname, encoding) as connection:
            for statement in statements:
                connection.execute(statement)  # type: ignore[arg-type]
    return one(at(served, "app"), SERVER) != server


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """A daemon for many tests; it must not have logged a traceback."""
    served = Daemon(
        "--log-level", "info", "-o", "wal_level=logical", "-o", "max_prepared_transactions=9"
    )
    Daemon.running.discard(served)  # otherwise the other fixture would stop it with each test
    yield served
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors and "never retrieved" not in errors


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE t (n int)"],
        ["CREATE TABLE t (n int)", "SELECT pg_stat_reset()"],
        ["SET track_counts = off", "CREATE FUNCTION f() RETURNS int RETURN 1"],
        ["SELECT lo_create(0)"],
        ["CREATE PUBLICATION p"],
        ["CREATE CAST (text AS bigint) WITH INOUT"],
        ["CREATE EVENT TRIGGER e ON ddl_command_end EXECUTE FUNCTION f()"],
        ["GRANT ALL ON SCHEMA public TO PUBLIC"],
        ["ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC"],
        ["REVOKE EXECUTE ON FUNCTION pg_catalog.now() FROM PUBLIC"],
        ["COMMENT ON SCHEMA public IS 'left behind'"],
        ["DROP SCHEMA public"],
        ["CREATE TABLE t (n int)", "BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 't'"],
        ["SELECT pg_create_logical_replication_slot('left_behind', 'pgoutput')"],
        ["COMMENT ON DATABASE postgres IS 'left behind'"],
        [
            "CREATE VIEW pg_authid AS SELECT * FROM pg_catalog.pg_authid WHERE oid = 10",
            "ALTER DATABASE postgres SET search_path = public, pg_catalog",
            TERMINATE,
            "CREATE ROLE left_behind SUPERUSER",
        ],
    ],
    ids=lambda statements: statements[-1],
)
def test_leaks_in_the_maintenance_database(shared: Daemon, statements: list[str]) -> None:
    """Objects, privileges, comments and rows are found.

    Counters that are off or reset, or a view that hides them, make no difference.
    """
    if statements[-1].startswith("CREATE EVENT TRIGGER"):
        body = "LANGUAGE plpgsql AS 'BEGIN END'"
        statements = [f"CREATE FUNCTION f() RETURNS event_trigger {body}", *statements]
    assert get_new_server_after(shared, "postgres", *statements)


@pytest.mark.parametrize(
    "statement",
    [
        b"CREATE TABLE t (n int)",
        b"CREATE DOMAIN d AS int",
        b"CREATE FUNCTION f() RETURNS int RETURN 1",
        b"CREATE SCHEMA s",
        b"SELECT lo_create(0)",
    ],
)
def test_leaks_of_a_walsender_in_the_maintenance_database(shared: Daemon, statement: bytes) -> None:
    """The server's counters include neither the session nor its rows."""
    with psycopg.connect(at(shared, "app"), autocommit=True) as lease:
        server = one_of(lease, SERVER)
        with inside(lease, replication="database") as walsender:
            for text in (b"SET track_counts = off", statement):
                done = walsender.pgconn.exec_(text)
                assert not done.error_message
    assert one(at(shared, "app"), SERVER) != server


def test_a_session_in_the_maintenance_database_without_changes(shared: Daemon) -> None:
    """A session that changed nothing there does not make the server stale."""
    one(at(shared, "app"), SERVER)
    assert not get_new_server_after(shared, "postgres", "SELECT count(*) FROM pg_proc")
    assert not get_new_server_after(shared, "postgres", "BEGIN; CREATE TABLE t (n int); ROLLBACK")


def test_template1_accepts_no_connections(shared: Daemon) -> None:
    """CREATE DATABASE uses it as its template, and a client can request a lease by that name."""
    with pytest.raises(psycopg.OperationalError, match="not currently accepting connections"):
        get_new_server_after(shared, "template1", "CREATE TABLE t (n int)")
    with psycopg.connect(at(shared, "template1"), autocommit=True) as lease:
        assert str(one_of(lease, "SELECT current_database()")).startswith("lease_")
        lease.execute("CREATE DATABASE made_by_hand")
        lease.execute("DROP DATABASE made_by_hand")


@pytest.mark.parametrize("dbname", ["template0", "template1", "pgtemp_template"])
def test_a_template_that_was_opened_changed_and_closed_again(shared: Daemon, dbname: str) -> None:
    with psycopg.connect(at(shared, "app"), autocommit=True) as lease:
        server = one_of(lease, SERVER)
        lease.execute(f"ALTER DATABASE {dbname} ALLOW_CONNECTIONS true")  # type: ignore[arg-type]
        with inside(lease, dbname) as connection:
            connection.execute("CREATE TABLE left_behind (n int)")
        lease.execute(f"ALTER DATABASE {dbname} ALLOW_CONNECTIONS false")  # type: ignore[arg-type]
    with psycopg.connect(at(shared, "app")) as lease:
        assert one_of(lease, SERVER) != server
        assert one_of(lease, "SELECT to_regclass('left_behind') IS NULL")


@pytest.mark.parametrize(
    "statement",
    [
        b'CREATE ROLE "r\377" SUPERUSER',
        b"COMMENT ON ROLE postgres IS 'r\377'",
        b"ALTER ROLE postgres SET application_name = 'r\377'",
        b'CREATE DATABASE "d\377"',
        b"BEGIN; CREATE TABLE t (n int); PREPARE TRANSACTION 'p\377'",
    ],
)
def test_names_that_are_not_utf8(shared: Daemon, statement: bytes) -> None:
    """Such a name, made in a SQL_ASCII database, is found, and so are the leaks after it."""
    with psycopg.connect(at(shared, "app"), autocommit=True) as lease:
        server = one_of(lease, SERVER)
        lease.execute(
            "CREATE DATABASE ascii ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'"
            " TEMPLATE template0"
        )
        with inside(lease, "ascii", "SQL_ASCII") as connection:
            connection.execute(statement)
        if b"PREPARE" not in statement:
            lease.execute("DROP DATABASE ascii")
    for _ in range(2):
        before, server = server, one(at(shared, "app"), SERVER)
        assert server != before
        with psycopg.connect(at(shared, "app"), autocommit=True) as lease:
            server = one_of(lease, SERVER)
            lease.execute("ALTER SYSTEM SET work_mem = '77MB'")
            lease.execute("CREATE ROLE left_behind SUPERUSER")
    roles = "SELECT count(*) FROM pg_roles WHERE rolname !~ '^(pg_|postgres)'"
    assert one(at(shared, "app"), roles) == 0


@pytest.mark.parametrize("name", ["n" * 64, "n" * 200, "ä" * 40, "n" * 62 + "ä" + "n"])
def test_users_with_long_names_keep_the_server(shared: Daemon, name: str) -> None:
    """PostgreSQL truncates the role's name; the client gets that role, and the server stays."""
    clipped = name.encode()[:63].decode(errors="ignore")
    server = one(at(shared, "app"), SERVER)
    for _ in range(3):
        with psycopg.connect(at(shared, name, name), autocommit=True) as lease:
            assert one_of(lease, "SELECT current_user::text") == clipped
            assert one_of(lease, SERVER) == server
    assert one(at(shared, "app"), SERVER) == server


def test_databases_and_sessions_with_long_names(daemon: DaemonType, shared: Daemon) -> None:
    """A database's name is truncated; a session's is not."""
    long = "d" * 80
    with Client(("127.0.0.1", shared.port), user="me", database=f"{long}~{long}1") as first:
        first.query("CREATE TABLE t (n int)")
        assert one(at(shared, f"{long[:63]}~{long}1", "me"), "SELECT count(*) FROM t") == 0
        with pytest.raises(psycopg.errors.UndefinedTable):
            one(at(shared, f"{long}~{long}2", "me"), "SELECT count(*) FROM t")
    own = daemon("--isolation", "cluster", "--pool", "0")
    assert one(at(own, long, long), "SELECT current_database() || current_user") == "d" * 126


def test_a_user_whose_name_is_not_utf8_is_refused(shared: Daemon) -> None:
    """The error has the reason; no role and no database is created."""
    server = one(at(shared, "app"), SERVER)
    for parameters in ({"user": "r\udcff"}, {"user": "me", "database": "d\udcff"}):
        with pytest.raises(RefusedError) as refused:
            Client(("127.0.0.1", shared.port), **parameters)
        assert refused.value.sqlstate == "22021"
    assert one(at(shared, "app"), SERVER) == server


def test_a_changed_file_with_the_same_size_and_time(shared: Daemon) -> None:
    """A program can set a file's modification time, but not its change time."""
    with psycopg.connect(at(shared, "app"), autocommit=True) as lease:
        server = one_of(lease, SERVER)
        path = Path(str(one_of(lease, "SHOW hba_file")))
        before = path.stat()
        text = path.read_text()
        path.write_text(text.replace("trust", "t\rust"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == before.st_size
    assert one(at(shared, "app"), SERVER) != server


def test_a_leak_check_that_is_blocked(shared: Daemon) -> None:
    """While a lock keeps pgtemp from reading the catalogs, the next client gets another server."""
    with psycopg.connect(at(shared, "app"), autocommit=True) as lease:
        server = one_of(lease, SERVER)
        with inside(lease) as connection:
            connection.execute("BEGIN; LOCK TABLE pg_replication_origin, pg_subscription")
            lease.execute("CREATE ROLE left_behind SUPERUSER")
            lease.close()
            with psycopg.connect(at(shared, "app"), autocommit=True) as other:
                assert one_of(other, SERVER) != server
                roles = "SELECT count(*) FROM pg_roles WHERE rolname = 'left_behind'"
                assert one_of(other, roles) == 0


def test_a_role_of_a_client_is_not_adopted(daemon: DaemonType) -> None:
    """A login as a role that another client created does not make that role permanent."""
    served = daemon("--pool", "1")
    bob = served.uri.replace("postgres@", "bob@")
    with psycopg.connect(served.uri, autocommit=True) as attacker:
        attacker.execute("CREATE ROLE bob NOLOGIN CONNECTION LIMIT 0")
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(bob)
    assert eventually(lambda: _admits(bob))


def _admits(uri: str) -> bool:
    try:
        psycopg.connect(uri).close()
    except psycopg.OperationalError:
        return False
    return True


def test_settings_of_the_stub_reach_no_database(daemon: DaemonType) -> None:
    """Databases with recycled directories get only the settings of their template."""
    served = daemon("--pool", "1")
    with psycopg.connect(served.uri + "~template", autocommit=True) as edit:
        (dbname,) = edit.execute("SELECT current_database()").fetchone() or ("",)
        edit.execute(f'ALTER DATABASE "{dbname}" SET work_mem TO 9000'.encode())
    seen = []
    for _ in range(14):
        with psycopg.connect(served.uri, autocommit=True) as client:
            seen.append(client.execute("SHOW search_path").fetchone())
            stubs = client.execute("SELECT datname FROM pg_database WHERE datname ~ '^stub'")
            for (stub,) in stubs.fetchall():
                client.execute(f'ALTER DATABASE "{stub}" SET search_path = evil'.encode())
    assert set(seen) == {('"$user", public',)}


def test_a_login_with_a_library_counts_as_use(daemon: DaemonType) -> None:
    """Settings of a login can run code before the first statement, so the lease counts as used."""
    served = daemon("--pool", "1", "--log-level", "info")
    psycopg.connect(served.uri, options="-c session_preload_libraries=auto_explain").close()
    psycopg.connect(served.uri).close()
    _, errors = served.end()
    assert errors.count("used True") == 1 and errors.count("used False") == 1


def test_large_comments_are_not_read(daemon: DaemonType) -> None:
    """The daemon compares hashes: a text of 200 MB in a catalog does not reach its memory."""
    served = daemon("--pool", "1")
    status = Path(f"/proc/{served.process.pid}/status")

    def peak() -> int:
        return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) >> 10

    psycopg.connect(served.uri).close()
    before = peak()
    with psycopg.connect(served.uri, autocommit=True) as client:
        client.execute("CREATE ROLE commented")
        client.execute(
            "DO $$BEGIN EXECUTE"
            " format('COMMENT ON ROLE commented IS %L', repeat('x', 200000000)); END$$"
        )
    with psycopg.connect(served.uri) as after:
        after.execute("SELECT 1")
    assert peak() < before + 100


OF_READY_DATABASES = {
    "drop": "DROP DATABASE {} WITH (FORCE)",
    "rename": "ALTER DATABASE {} RENAME TO lease_of_another",
    "comment": "COMMENT ON DATABASE {} IS 'left behind'",
    "connection limit": "ALTER DATABASE {} CONNECTION LIMIT 7",
    "no connections": "ALTER DATABASE {} ALLOW_CONNECTIONS false",
    "setting": "ALTER DATABASE {} SET work_mem = '77MB'",
    "setting of a role": "ALTER ROLE postgres IN DATABASE {} SET work_mem = '77MB'",
    "privilege": "REVOKE CONNECT ON DATABASE {} FROM PUBLIC",
    "owner": "ALTER DATABASE {} OWNER TO pg_monitor",
}


@pytest.mark.parametrize("statement", OF_READY_DATABASES.values(), ids=OF_READY_DATABASES)
def test_databases_that_no_lease_had_yet(shared: Daemon, statement: str) -> None:
    """A lease drops or changes the databases that wait for later leases."""
    others = (
        "SELECT format('%I', datname) FROM pg_database"
        " WHERE datname LIKE 'lease%' AND datname <> current_database()"
    )
    for _ in range(3):
        one(at(shared, "app"), "SELECT 1")
    with psycopg.connect(at(shared, "app"), autocommit=True) as lease:
        server = one_of(lease, SERVER)
        assert eventually(lambda: len(lease.execute(others).fetchall()) >= 2)
        for (name,) in lease.execute(others).fetchall():
            with suppress(psycopg.Error):  # it is dropped or renamed at this moment
                lease.execute(statement.format(name))  # type: ignore[arg-type]
    state = (
        "SELECT (datconnlimit, shobj_description(oid, 'pg_database'), datacl,"
        " current_setting('work_mem'), pg_get_userbyid(datdba))::text"
        " FROM pg_database WHERE datname = current_database()"
    )
    found = [one(at(shared, "app"), state) for _ in range(6)]
    assert one(at(shared, "app"), SERVER) != server
    assert found == ["(-1,,,4MB,postgres)"] * 6


def test_a_dropped_database_is_not_handed_out_twice(daemon: DaemonType) -> None:
    """The lease that dropped it is still connected; its leak check has yet to come."""
    served = daemon()
    for _ in range(3):
        one(at(served, "app"), "SELECT 1")
    with psycopg.connect(at(served, "app"), autocommit=True) as lease:
        others = (
            "SELECT format('%I', datname) FROM pg_database"
            " WHERE datname LIKE 'lease%' AND datname <> current_database()"
        )
        for (name,) in lease.execute(others).fetchall():
            with suppress(psycopg.Error):  # it is dropped or renamed at this moment
                lease.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[arg-type]

        def serves() -> bool:
            try:
                return one(at(served, "app"), "SELECT 1") == 1
            except psycopg.OperationalError:
                return False

        assert eventually(serves)
        assert [serves() for _ in range(10)] == [True] * 10


def is_replaced_after(served: Daemon, statement: str) -> bool:
    """Whether the next lease gets a new server after a lease executed a statement."""
    with psycopg.connect(at(served, "app"), autocommit=True) as lease:
        server = one_of(lease, SERVER)
        lease.execute(statement)  # type: ignore[arg-type]
    return one(at(served, "app"), SERVER) != server


def test_a_dependency_of_a_role(shared: Daemon) -> None:
    """Such a row would keep a role from being dropped."""
    assert is_replaced_after(
        shared,
        "INSERT INTO pg_shdepend SELECT 0, 'pg_tablespace'::regclass, 1664, 0,"
        " 'pg_authid'::regclass, oid, 'a' FROM pg_authid WHERE rolname = 'pg_monitor'",
    )


def test_many_leaked_objects(shared: Daemon) -> None:
    """More than the leak check lists: the server is replaced, and the log line stays short."""
    assert is_replaced_after(
        shared,
        "INSERT INTO pg_replication_origin SELECT n, 'left_' || n FROM generate_series(1, 30000) n",
    )
