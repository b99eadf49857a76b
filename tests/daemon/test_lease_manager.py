"""Sessions, templates and limits of the daemon: the effect of each part of the URL."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import asyncpg
import psycopg
import pytest

from pgtemp.wire.messages import TERMINATE, frame, startup_message
from support import Daemon, at, eventually, homes, one, own_memory

DaemonType = type[Daemon]
BOTH = pytest.mark.parametrize("isolation", ["database", "cluster"])


def do(uri: str, *statements: str) -> None:
    with psycopg.connect(uri, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)  # type: ignore[arg-type]


TABLES = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"


@pytest.mark.parametrize("isolation", ["database", pytest.param("cluster", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dbname", ["postgres", "pgtemp_template"])
def test_names_that_every_server_has(
    daemon: DaemonType, isolation: str, dbname: str, tmp_path: Path
) -> None:
    """The daemon's own database may have such a name, also with a dump."""
    (tmp_path / "a.sql").write_text("CREATE TABLE a (n int)")
    for arguments in ([], ["--load-from", str(tmp_path / "a.sql")]):
        served = daemon("--isolation", isolation, *arguments, dbname=dbname)
        loaded = len(arguments) / 2
        assert one(served.uri, TABLES) == loaded
        assert one(at(served, "other"), TABLES) == loaded
        do(at(served, f"{dbname}~template"), "CREATE TABLE b (n int)")
        assert one(served.uri, TABLES) == loaded + 1


@BOTH
def test_connections_that_name_a_session_share_a_database(
    daemon: DaemonType, isolation: str
) -> None:
    """Twenty pooled connections share a session's database; without one, each gets its own."""
    served = daemon("--isolation", isolation, "--pool", "1")

    async def use(dbname: str) -> list[int]:
        pool = await asyncpg.create_pool(at(served, dbname), min_size=20, max_size=20)
        await pool.execute("CREATE TABLE IF NOT EXISTS t (n int)")
        acquired = [await pool.acquire() for _ in range(20)]
        for number, connection in enumerate(acquired):
            await connection.execute("CREATE TABLE IF NOT EXISTS t (n int)")
            await connection.execute("INSERT INTO t VALUES ($1)", number)
        rows = [await connection.fetchval("SELECT count(*) FROM t") for connection in acquired]
        for connection in acquired:
            await pool.release(connection)
        await pool.close()
        return rows

    assert asyncio.run(use("test~together")) == [20] * 20
    if isolation == "database":
        assert asyncio.run(use("test")) == [1] * 20


@BOTH
def test_a_session_may_be_named_in_options(daemon: DaemonType, isolation: str) -> None:
    """In the database's name, in libpq's options, and as a parameter of the start-up packet."""
    served = daemon("--isolation", isolation)
    do(at(served, "test~mine"), "CREATE TABLE t (n int)")
    for options in ("-c pgtemp.session=mine", "-cpgtemp.session=mine", "--pgtemp.session=mine"):
        uri = at(served, "test") + f"?options={quote(options)}"
        assert one(uri, TABLES) == 1
        assert one(uri, "SHOW pgtemp.session") == "mine"

    async def by_parameter() -> int:
        connection = await asyncpg.connect(
            at(served, "test"), server_settings={"pgtemp.session": "mine"}
        )
        found: int = await connection.fetchval(TABLES)
        await connection.close()
        return found

    assert asyncio.run(by_parameter()) == 1
    assert one(at(served, "test~other"), TABLES) == 0


def test_clients_that_open_a_session_at_once_get_one_database(daemon: DaemonType) -> None:
    served = daemon("--pool", "0")
    barrier = threading.Barrier(8)

    def enter(_: int) -> object:
        barrier.wait()
        with psycopg.connect(at(served, "test~new")) as connection:
            barrier.wait()
            row = connection.execute("SELECT current_database()").fetchone()
            assert row is not None
            return row[0]

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(enter, range(8)))) == 1


def test_a_session_lingers_and_then_ends(daemon: DaemonType) -> None:
    """It outlives its last connection by `linger` seconds; the next one gets a new database."""
    served = daemon("--linger", "0.2")
    do(at(served, "test~s"), "CREATE TABLE t (n int)")
    assert one(at(served, "test~s"), TABLES) == 1
    assert eventually(lambda: one(at(served, "test~s-other"), TABLES) == 0)
    pause = threading.Event()

    def starts_again() -> bool:
        pause.wait(0.5)  # each check is a connection, after which the session lingers again
        return one(at(served, "test~s"), TABLES) == 0

    assert eventually(starts_again)


@BOTH
def test_any_tool_can_migrate_the_template_itself(daemon: DaemonType, isolation: str) -> None:
    """It is sealed when its last connection ends.

    Later clones have the changes, and a client can open it again.
    """
    served = daemon("--isolation", isolation)
    do(at(served, "app"), "CREATE TABLE before (n int)")
    for number in (1, 2):
        command = ["psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", at(served, "app~template", "me")]
        sql = f"CREATE TABLE t{number} AS SELECT {number} AS n"
        subprocess.run([*command, "-c", sql], check=True)
        # At once: a client that connects now waits until the template is sealed.
        for name in ("app", f"app~session{number}"):
            assert one(at(served, name), TABLES) == number
        assert one(at(served, "other"), TABLES) == 0
    do(at(served, "app"), "DROP TABLE t1")
    assert one(at(served, "app"), "SELECT n FROM t1") == 1


def test_a_template_without_statements_is_not_sealed(daemon: DaemonType) -> None:
    served = daemon()
    psycopg.connect(at(served, "app~template")).close()
    do(at(served, "app~template"), "CREATE TABLE t (n int)")
    psycopg.connect(at(served, "app~template")).close()
    assert one(at(served, "app"), TABLES) == 1


def test_a_template_that_is_being_edited_is_refused(daemon: DaemonType) -> None:
    """The client gets an error, not an unfinished database."""
    served = daemon("--wait", "0.3")
    with psycopg.connect(at(served, "app~template")):
        with pytest.raises(psycopg.OperationalError, match="is still being edited") as refused:
            psycopg.connect(at(served, "app"))
        assert "HINT:  close all connections to app~template" in str(refused.value)
        assert one(at(served, "other"), TABLES) == 0


@BOTH
def test_templates_on_the_command_line(daemon: DaemonType, isolation: str, tmp_path: Path) -> None:
    """From SQL, a directory, a command or another template; the default one has the dump."""
    (tmp_path / "a.sql").write_text("CREATE TABLE a (n int);")
    (tmp_path / "dir").mkdir()
    for number in (1, 2):
        (tmp_path / "dir" / f"{number}.sql").write_text(f"CREATE TABLE d{number} (n int);")
    script = "psql $DATABASE_URL -qc 'CREATE TABLE c (n int)'"
    served = daemon(
        "--isolation", isolation, "--pool", "1",
        "--template", f"one={tmp_path / 'a.sql'}",
        "--template", f"many={tmp_path / 'dir'}",
        "--template", f"upon:one={tmp_path / 'dir'}",
        "--template", f"made=cmd:{script}",
        "--load-from", str(tmp_path / "a.sql"),
        "--extension", "citext",
    )  # fmt: skip
    tables = (
        "SELECT string_agg(tablename, ' ' ORDER BY 1) FROM pg_tables WHERE schemaname = 'public'"
    )
    for dbname, expected in {
        "one": "a", "many": "d1 d2", "upon": "a d1 d2", "made": "c", "other": "a", "test": "a"
    }.items():  # fmt: skip
        assert one(at(served, dbname), tables) == expected
        assert one(at(served, dbname), "SELECT 'A'::citext = 'a'") is True


def test_a_cached_template_is_not_built_again_by_the_next_daemon(
    daemon: DaemonType, tmp_path: Path
) -> None:
    """With `--watch`, a command runs again only when the watched files change."""
    (tmp_path / "schema.txt").write_text("1")
    log = tmp_path / "log"
    command = f"cmd:echo built >> {log}; psql $DATABASE_URL -qc 'CREATE TABLE t (n int)'"
    for expected in (1, 1, 2):
        arguments = ["--template", f"app={command}", "--watch", f"app={tmp_path / 'schema.txt'}"]
        served = daemon(*arguments)
        assert one(at(served, "app"), TABLES) == 1
        served.end()
        assert log.read_text().count("built") == expected
        if expected == 1 and log.read_text().count("built") == 1 and not (tmp_path / "x").exists():
            (tmp_path / "x").touch()
        else:
            (tmp_path / "schema.txt").write_text("2")


def test_a_database_created_within_a_lease_is_refused_with_a_hint(daemon: DaemonType) -> None:
    """The client does not get an empty clone. The database is dropped when its lease ends."""
    served = daemon()
    with psycopg.connect(at(served, "postgres"), autocommit=True) as maker:
        maker.execute("CREATE DATABASE test_app")
        for name in ("test_app", "test_app~session"):
            with pytest.raises(psycopg.OperationalError, match="created within a lease") as refused:
                psycopg.connect(at(served, name))
            assert "--single" in str(refused.value) and "pgtemp.session" in str(refused.value)
        own = one(at(served, "x~s"), "SELECT current_database()")
        with pytest.raises(psycopg.OperationalError, match="created within a lease"):
            psycopg.connect(at(served, str(own)))  # another lease's database
    names = "SELECT count(*) FROM pg_database WHERE datname = 'test_app'"
    assert one(at(served, "x"), names) == 0


@BOTH
def test_tools_that_create_their_own_database(daemon: DaemonType, isolation: str) -> None:
    """As Django, Rails and sqlx do: CREATE DATABASE from `postgres`, use it, DROP DATABASE."""
    served = daemon(*(["--isolation", "cluster"] if isolation == "cluster" else ["--single"]))
    session = "?options=-c%20pgtemp.session%3Dtools" if isolation == "cluster" else ""
    for _ in range(2):
        do(at(served, "postgres") + session, "CREATE DATABASE test_app")
        do(at(served, "test_app") + session, "CREATE TABLE t (n int)")
        assert one(at(served, "test_app") + session, TABLES) == 1
        do(at(served, "postgres") + session, "DROP DATABASE test_app")
        with pytest.raises(psycopg.OperationalError, match='"test_app" does not exist'):
            psycopg.connect(at(served, "test_app") + session)


LEAKS = [
    ["CREATE ROLE left_behind LOGIN"],
    ["CREATE ROLE left_behind", "CREATE TABLE t (n int)", "ALTER TABLE t OWNER TO left_behind"],
    ["CREATE ROLE a", "CREATE ROLE b", "GRANT a TO b"],
    ["ALTER ROLE postgres SET search_path = nowhere"],
    ["COMMENT ON ROLE postgres IS 'left behind'"],
    ["ALTER ROLE postgres CONNECTION LIMIT 0", "CREATE ROLE x"],
    ["ALTER SYSTEM SET work_mem = '77MB'", "SELECT pg_reload_conf()"],
    ["GRANT SET ON PARAMETER work_mem TO PUBLIC"],
    ["CREATE DATABASE byhand"],
    ["ALTER DATABASE postgres SET work_mem = '77MB'"],
    ["SELECT pg_create_physical_replication_slot('left_behind')"],
    ["SELECT pg_replication_origin_create('left_behind')"],
    ["SELECT pg_create_logical_replication_slot('left_behind', 'test_decoding')"],
    ["CREATE TABLE t (n int)", "BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'left'"],
    [
        "CREATE PUBLICATION p",
        "CREATE SUBSCRIPTION s CONNECTION 'host=/nowhere' PUBLICATION p WITH (connect = false)",
        "ALTER SUBSCRIPTION s SET (slot_name = 'not_there')",
    ],
    ["SELECT pg_advisory_lock(1), pg_advisory_lock_shared(2)"],
    [
        "SET allow_in_place_tablespaces = on",
        "CREATE TABLESPACE left_behind LOCATION ''",
        "CREATE TABLE t (n int) TABLESPACE left_behind",
    ],
]
FEW = 8  # that an ordinary test run includes


@pytest.mark.parametrize(
    "statements",
    [*LEAKS[:FEW], *(pytest.param(one, marks=pytest.mark.slow) for one in LEAKS[FEW:])],
    ids=lambda statements: statements[0],
)
def test_leaks_of_a_lease_do_not_reach_the_next(daemon: DaemonType, statements: list[str]) -> None:
    """The next lease starts at once, from the pool or with a warm connection.

    The server has no other lease, or one.
    """
    served = daemon("-o", "wal_level=logical", "-o", "max_prepared_transactions=9")
    state = (
        "SELECT md5((SELECT string_agg(a::text, ',' ORDER BY oid) FROM pg_authid a) ||"
        " (SELECT count(*) FROM pg_auth_members)::text || current_setting('work_mem') ||"
        " (SELECT count(*) FROM pg_parameter_acl)::text ||"
        " (SELECT count(*) FROM pg_shdescription)::text ||"
        " (SELECT count(*) FROM pg_db_role_setting)::text ||"
        " (SELECT count(*) FROM pg_replication_origin)::text ||"
        " (SELECT count(*) FROM pg_replication_slots)::text ||"
        " (SELECT count(*) FROM pg_prepared_xacts)::text ||"
        " (SELECT count(*) FROM pg_subscription)::text ||"
        " (SELECT count(*) FROM pg_tablespace)::text ||"
        " (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory')::text ||"
        " (SELECT count(*) FROM pg_database WHERE datname = 'byhand')::text)"
    )
    for _ in range(4):  # so that there are warm connections for such clients
        before = one(at(served, "test"), state)
    do(at(served, "test"), *statements)
    assert one(at(served, "test"), state) == before
    with psycopg.connect(at(served, "test~neighbour"), autocommit=True) as neighbour:
        do(at(served, "test"), *statements)
        assert one(at(served, "test"), state) == before
        assert neighbour.execute("SELECT 1").fetchone() == (1,)  # existing leases stay


@pytest.mark.slow
def test_five_hundred_connections_that_are_reset(daemon: DaemonType) -> None:
    """Each client resets in a transaction that holds a lock: the next client finds none of them."""
    served = daemon("--linger", "0.1")
    hello = startup_message({"user": "postgres", "database": "test~crowd"})
    begin = frame(b"Q", b"BEGIN; SELECT pg_advisory_lock_shared(1)\0")
    crowd = []
    for _ in range(500):
        crowd.append(socket.create_connection(("127.0.0.1", served.port)))
        crowd[-1].sendall(hello + begin)
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    assert eventually(lambda: one(at(served, "test~crowd"), locks) == 500, 60)
    for connection in crowd:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    assert eventually(lambda: one(at(served, "test~crowd"), locks) == 0, 60)
    clients = "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'"
    assert one(at(served, "test"), clients) == 0


def test_a_role_of_a_template_keeps_its_rights(daemon: DaemonType, tmp_path: Path) -> None:
    """A client that connects as a role of the template is that role, not a superuser."""
    (tmp_path / "a.sql").write_text(
        "CREATE ROLE reader LOGIN; CREATE TABLE t AS SELECT 1 AS n; GRANT SELECT ON t TO reader;"
    )
    served = daemon("--template", f"app={tmp_path / 'a.sql'}")
    assert one(at(served, "app", "reader"), "SELECT n FROM t") == 1
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        do(at(served, "app", "reader"), "INSERT INTO t VALUES (2)")


@BOTH
def test_role_attributes(daemon: DaemonType, isolation: str) -> None:
    """An ordinary user owns its database and is not a superuser; the daemon's own user is one."""
    served = daemon("--role-attributes", "NOSUPERUSER CREATEDB", "--isolation", isolation)
    for _ in range(4):
        with psycopg.connect(at(served, "test", "joe"), autocommit=True) as connection:
            row = connection.execute(
                "SELECT rolsuper, rolcreatedb FROM pg_roles WHERE rolname = current_user"
            ).fetchone()
            assert row == (False, True)
            connection.execute("CREATE TABLE t (n int)")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute("SELECT pg_read_file('PG_VERSION')")
    assert one(at(served, "test"), "SHOW is_superuser") == "on"
    do(at(served, "app~template", "joe"), "CREATE TABLE t AS SELECT 1 AS n")
    assert one(at(served, "app", "joe"), "SELECT n FROM t") == 1


def test_the_limit_of_leases(daemon: DaemonType) -> None:
    """Further clients wait in the order of their arrival; then they get an error with a hint."""
    served = daemon("--max-databases", "2", "--wait", "1")
    first, second = (psycopg.connect(at(served, "test")) for _ in range(2))
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(psycopg.connect, at(served, "test"))
        assert not waiting.done()
        first.close()
        third = waiting.result(10)
    with pytest.raises(psycopg.OperationalError, match="2 leases, which is the limit") as refused:
        psycopg.connect(at(served, "test"))
    assert "--max-databases" in str(refused.value)
    for connection in (second, third):
        connection.close()
    assert one(at(served, "test"), TABLES) == 0


def test_the_limit_of_connections_per_session(daemon: DaemonType) -> None:
    served = daemon("--max-connections-per-lease", "2")
    held = [psycopg.connect(at(served, "test~s")) for _ in range(2)]
    with pytest.raises(psycopg.OperationalError, match="has 2 connections, which is the limit"):
        psycopg.connect(at(served, "test~s"))
    held[0].close()
    assert eventually(lambda: _connects(at(served, "test~s")))
    held[1].close()


def _connects(uri: str) -> bool:
    try:
        psycopg.connect(uri).close()
    except psycopg.OperationalError:
        return False
    return True


def test_an_idle_lease_ends(daemon: DaemonType) -> None:
    """A lease with activity continues; a silent one gets an error and ends."""
    served = daemon("--idle-ttl", "0.5")
    with psycopg.connect(at(served, "test"), autocommit=True) as busy:
        idle = psycopg.connect(at(served, "test"), autocommit=True)

        def is_ended() -> bool:
            busy.execute("SELECT 1")
            return _is_closed(idle)

        assert eventually(is_ended)
        busy.execute("SELECT 1")


def _is_closed(connection: psycopg.Connection) -> bool:
    """Whether the server has closed the connection; checked without sending anything."""
    try:
        connection.pgconn.consume_input()
    except psycopg.OperationalError:
        return True
    return False


@pytest.mark.parametrize("dbname", ["~", "test~", "~s"])
def test_an_incomplete_database_name(daemon: DaemonType, dbname: str) -> None:
    served = daemon("--pool", "0")
    with pytest.raises(psycopg.OperationalError, match="write /DBNAME, /DBNAME~SESSION"):
        psycopg.connect(at(served, dbname))


def test_the_log_has_one_line_per_lease(daemon: DaemonType) -> None:
    served = daemon("--log-level", "info", "--log-json")
    do(at(served, "test~s", "me"), "SELECT 1")
    do(at(served, "test"), "SELECT 1")
    _, errors = served.end()
    entries = [json.loads(line) for line in errors.splitlines()]
    leases = {line["lease"]: line for line in entries if "lease" in line}
    assert leases[1]["session"] == "s" and leases[1]["user"] == "me"
    assert leases[2]["session"] is None and leases[2]["database"] == "test"
    assert all(line["bytes_in"] > 0 and line["bytes_out"] > 0 for line in leases.values())
    assert all(line["lived_s"] >= 0 and line["waited_ms"] >= 0 for line in leases.values())


@pytest.mark.slow
def test_two_hundred_leases_at_once(daemon: DaemonType) -> None:
    """Each sees only its own row, and nothing is left of them."""
    before = homes()
    served = daemon("--pool", "4")

    async def use() -> None:
        connections = await asyncio.gather(
            *(asyncpg.connect(at(served, "test"), timeout=120) for _ in range(200))
        )
        for number, connection in enumerate(connections):
            await connection.execute(f"CREATE TABLE t AS SELECT {number} AS n")
        assert [await c.fetchval("SELECT n FROM t") for c in connections] == list(range(200))
        await asyncio.gather(*(connection.close() for connection in connections))

    asyncio.run(use())
    count = "SELECT count(*) FROM pg_database"
    assert eventually(lambda: int(str(one(at(served, "test~s"), count))) < 50, 60)
    assert served.end()[0] == 0
    assert eventually(lambda: homes() <= before)


def test_leases_continue_after_a_crash_of_the_shared_server(daemon: DaemonType) -> None:
    """New leases get a new server after a crash of a backend or of the postmaster."""
    served = daemon()
    pid_file = "SELECT (string_to_array(pg_read_file('postmaster.pid'), E'\\n'))[1]"
    for pid_query in ("SELECT pg_backend_pid()", pid_file):
        for _ in range(3):
            one(at(served, "test"), "SELECT 1")
        with psycopg.connect(at(served, "test")) as connection:
            row = connection.execute(pid_query).fetchone()  # type: ignore[arg-type]
            assert row is not None
            subprocess.run(["kill", "-SEGV" if "backend" in pid_query else "-KILL", str(row[0])],
                           check=True)  # fmt: skip
            with pytest.raises(psycopg.OperationalError):
                while True:
                    connection.execute("SELECT 1")
        assert eventually(lambda: _works(at(served, "test")), 30)
        assert one(at(served, "test"), TABLES) == 0


def _works(uri: str) -> bool:
    try:
        return one(uri, "SELECT 1") == 1
    except psycopg.OperationalError:
        return False


@pytest.mark.slow
def test_five_thousand_leases_in_a_row(daemon: DaemonType) -> None:
    """The daemon's memory stays at its size after the first thousand, and nothing is left."""
    before = homes()
    served = daemon()
    hello = startup_message({"user": "postgres", "database": "test"})
    query = frame(b"Q", b"CREATE TABLE t (n int)\0")

    def lease() -> None:
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            for message in (hello, query):
                client.sendall(message)
                answer = b""
                while not answer.endswith(b"Z\0\0\0\5I"):
                    arrived = client.recv(65536)
                    assert arrived, answer
                    answer += arrived
            assert b"CREATE TABLE" in answer
            client.sendall(TERMINATE)

    sizes = []
    for _ in range(5):
        for _ in range(1000):
            lease()
        sizes.append(own_memory(served.process.pid))
    assert max(sizes[1:]) - sizes[0] < 1 << 20, sizes
    count = "SELECT count(*) FROM pg_database"
    assert int(str(one(at(served, "test"), count))) < 50
    assert served.end() == (0, "")
    assert eventually(lambda: homes() <= before)


@pytest.mark.parametrize("clients", [1, 4])
def test_many_leases_in_one_server(daemon: DaemonType, clients: int) -> None:
    """One lease's database is dropped during the leak check of another: it is not a leak."""
    served = daemon()

    def server(_: int) -> object:
        with psycopg.connect(served.uri) as connection:
            return connection.execute("SELECT pg_postmaster_start_time()").fetchone()

    with ThreadPoolExecutor(clients) as threads:
        assert len(set(threads.map(server, range(150)))) == 1
