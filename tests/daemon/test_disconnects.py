"""Clients that disconnect abruptly, templates that change while in use, servers that exit."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from pgtemp.wire.messages import frame, startup_message
from support import Daemon, at, eventually, homes, one

DaemonType = type[Daemon]
BOTH = pytest.mark.parametrize("isolation", ["database", "cluster"])
TABLES = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"


def test_a_reset_connection_of_another_user_is_refused(daemon: DaemonType, other_user: str) -> None:
    """Another user's connection that is reset before the daemon can identify it is refused."""
    served = daemon("--log-level", "info")
    one(at(served, "test"), "SELECT 1")
    mark = Path("/tmp") / f"test-of-mark-{os.getpid()}"
    query = frame(b"Q", f"COPY (SELECT 1) TO PROGRAM 'touch {mark}'\0".encode())
    packet = startup_message({"user": "postgres", "database": "test"}) + query
    program = (
        "import socket, struct, sys\n"
        "for _ in range(200):\n"
        "    s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n"
        "    s.sendall(bytes.fromhex(sys.argv[2]))\n"
        "    s.close()\n"
    )
    subprocess.run(
        ["/usr/bin/python3", "-c", program, str(served.port), packet.hex()],
        user=other_user, cwd="/", check=True, env={},
    )  # fmt: skip
    one(at(served, "test"), "SELECT 1")
    _, errors = served.end()
    assert errors.count("lease ") == 2, errors
    assert not mark.exists()


def test_a_new_client_does_not_wait_for_a_running_query(daemon: DaemonType) -> None:
    """A half-closed client waits for its long query; new clients are served meanwhile."""
    served = daemon()
    with socket.create_connection(("127.0.0.1", served.port)) as half_closed:
        half_closed.sendall(startup_message({"user": "postgres", "database": "test"}))
        half_closed.sendall(frame(b"Q", b"SELECT pg_sleep(600)\0"))
        half_closed.shutdown(socket.SHUT_WR)
        busy = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'"
        assert eventually(lambda: one(at(served, "test~look"), busy) == 1)
        start = time.monotonic()
        assert [one(at(served, "x"), "SELECT 1") for _ in range(20)] == [1] * 20
        assert time.monotonic() - start < 20
        assert one(at(served, "test~look"), busy) == 1


def _socket_dir(served: Daemon) -> str:
    return served.output[-1].partition("socket is in ")[2].partition(";")[0]


@BOTH
@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_a_statement_is_canceled_when_its_client_disconnects(
    daemon: DaemonType, transport: str, isolation: str
) -> None:
    """A client that disconnects during a statement holds no database any longer."""
    served = daemon("--isolation", isolation)
    host = "127.0.0.1" if transport == "tcp" else _socket_dir(served)
    with closing(psycopg.connect(at(served, "test"), host=host)) as connection:
        backend = Path(f"/proc/{connection.info.backend_pid}")
        connection.pgconn.send_query(b"SELECT pg_sleep(600)")
        assert eventually(lambda: b"SELECT" in (backend / "cmdline").read_bytes())
    assert eventually(lambda: not backend.exists(), 30)


@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_a_half_closed_client_receives_the_answer(daemon: DaemonType, transport: str) -> None:
    """A half-closed connection is not a closed one, however long the statement takes."""
    served = daemon()
    with socket.socket(socket.AF_INET if transport == "tcp" else socket.AF_UNIX) as client:
        path = f"{_socket_dir(served)}/.s.PGSQL.{served.port}"
        client.connect(("127.0.0.1", served.port) if transport == "tcp" else path)
        client.sendall(startup_message({"user": "postgres", "database": "test"}))
        client.sendall(frame(b"Q", b"SELECT pg_sleep(1), 'the answer'\0"))
        client.shutdown(socket.SHUT_WR)
        assert b"the answer" in b"".join(iter(lambda: client.recv(4096), b""))


def test_settings_that_were_undone_reach_no_later_client(daemon: DaemonType) -> None:
    """A warm connection opened under another lease's settings is not used for a client."""
    served = daemon()
    read_only = "SHOW default_transaction_read_only"
    for _ in range(3):
        one(at(served, "test"), read_only)
    with psycopg.connect(at(served, "test"), autocommit=True) as other:
        other.execute("ALTER ROLE postgres SET default_transaction_read_only = on")
        with psycopg.connect(at(served, "test")) as connection:
            connection.execute("SELECT 1")
            # One that could not be opened is made up for when the next client has come.
            assert any(
                eventually(lambda: _warm_connections(other) == 2, 5)
                or one(at(served, "test"), "SELECT 0")
                for _ in range(4)
            )
            other.execute("ALTER ROLE postgres RESET default_transaction_read_only")
    assert [one(at(served, "test"), read_only) for _ in range(6)] == ["off"] * 6


def _warm_connections(connection: psycopg.Connection) -> int:
    """The number of open connections that have not sent a statement."""
    row = connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle' AND query = ''"
        " AND datname LIKE 'lease%'"
    ).fetchone()
    assert row is not None
    return int(row[0])


def postmaster_of(uri: str) -> int:
    return int(str(one(uri, "SELECT (string_to_array(pg_read_file('postmaster.pid'), E'\\n'))[1]")))


@BOTH
def test_a_session_whose_server_was_killed_starts_again(daemon: DaemonType, isolation: str) -> None:
    """Its next connection gets a new server; names that were not used before are served as well."""
    served = daemon("--isolation", isolation, "--linger", "600")
    assert one(at(served, "test~s"), TABLES) == 0
    os.kill(postmaster_of(at(served, "test~s")), signal.SIGKILL)
    assert eventually(lambda: _answers(at(served, "test~s")), 20)
    assert eventually(lambda: _answers(at(served, "test" if isolation == "cluster" else "new")), 20)


def _answers(uri: str) -> bool:
    try:
        return one(uri, "SELECT 1") == 1
    except psycopg.OperationalError:
        return False


def test_a_client_that_logs_in_when_the_server_is_killed_gets_an_error(daemon: DaemonType) -> None:
    """A client that has sent a complete start-up packet gets an error, not a silent close."""
    served = daemon()
    for _ in range(5):  # so that pgtemp has its own connections, and needs no more
        one(at(served, "test"), "SELECT 1")
    with psycopg.connect(at(served, "test~s"), autocommit=True) as connection:
        row = connection.execute("SHOW unix_socket_directories").fetchone()
        assert row is not None
        postmaster = postmaster_of(at(served, "test~s"))
        # Neither does it answer while it reads a pipe, nor can that be seen.
        connection.execute("COPY (SELECT 1) TO PROGRAM 'rm pg_hba.conf; mkfifo pg_hba.conf'")
        connection.execute("SELECT pg_reload_conf()")
        reads = Path(f"/proc/{postmaster}/wchan")
        assert eventually(lambda: reads.read_text() in ("wait_for_partner", "fifo_open"))
        connections = Path("/proc/net/unix")
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            before = connections.read_text().count(row[0])
            client.sendall(startup_message({"user": "postgres", "database": "test~s"}))
            assert eventually(lambda: connections.read_text().count(row[0]) > before)
            os.kill(postmaster, signal.SIGKILL)
            client.settimeout(30)
            answer = b""
            while data := client.recv(1024):
                answer += data
    assert answer[:1] == b"E" and b"C57P03\0" in answer, answer
    assert eventually(lambda: _answers(at(served, "test")), 20)


@pytest.mark.parametrize(
    "command",
    ["echo local all all reject > pg_hba.conf", "echo fsync=on >> postgresql.conf",
     pytest.param("rm ../socket/.s.PGSQL.5432", marks=pytest.mark.skipif(
         os.geteuid() == 0, reason="root does not let the server's user do that"))],
)  # fmt: skip
def test_a_server_whose_files_were_changed_is_replaced(daemon: DaemonType, command: str) -> None:
    """A superuser can change a server's files from SQL.

    One client may be refused; later clients get a server with the usual settings.
    """
    served = daemon()
    for _ in range(5):  # so that pgtemp has its own connections, and needs no more
        one(at(served, "test"), "SELECT 1")
    with psycopg.connect(at(served, "test"), autocommit=True) as connection:
        connection.execute(f"COPY (SELECT 1) TO PROGRAM 'cat; {command}'")  # type: ignore[arg-type]
        connection.execute("SELECT pg_reload_conf()")
    assert eventually(lambda: all(_answers(at(served, "test")) for _ in range(8)))
    assert [one(at(served, "test"), "SHOW fsync") for _ in range(5)] == ["off"] * 5


@BOTH
def test_a_server_that_is_shutting_down_gets_no_new_lease(
    daemon: DaemonType, isolation: str
) -> None:
    """It runs until its last client disconnects; new clients get another server."""
    served = daemon("--isolation", isolation, "--linger", "600")
    with psycopg.connect(at(served, "test"), autocommit=True) as connected:
        one(at(served, "test~s"), "SELECT 1")
        for dbname in ("test", "test~s"):
            os.kill(postmaster_of(at(served, dbname)), signal.SIGTERM)
            assert eventually(lambda name=dbname: _answers(at(served, name)))  # type: ignore[misc]
        for _ in range(5):
            assert one(at(served, "test"), "SELECT 1") == 1
            assert one(at(served, "test~s"), "SELECT 1") == 1
        assert connected.execute("SELECT 1").fetchone() == (1,)


def test_killed_servers_are_removed_without_a_pool(daemon: DaemonType) -> None:
    before = homes()
    served = daemon("--pool", "0")
    assert eventually(lambda: _answers(at(served, "test")))
    usual = len(homes() - before)
    for _ in range(3):
        os.kill(postmaster_of(at(served, "test")), signal.SIGKILL)
        assert eventually(lambda: _answers(at(served, "test")), 20)
    assert eventually(lambda: len(homes() - before) <= usual)


@BOTH
def test_clients_that_wait_while_a_template_is_replaced_get_the_new_one(
    daemon: DaemonType, isolation: str
) -> None:
    """Waiting clients move to the new template; a client of the old one keeps its database."""
    served = daemon("--isolation", isolation, "--pool", "1")
    with psycopg.connect(at(served, "app~template"), autocommit=True) as editor:
        editor.execute("CREATE TABLE t1 (n int)")
    with psycopg.connect(at(served, "app")) as keeper, ThreadPoolExecutor(12) as threads:
        keeper.execute("SELECT * FROM t1")

        def use(_: int) -> object:
            return one(at(served, "app"), TABLES)

        first = [threads.submit(use, number) for number in range(10)]
        with psycopg.connect(at(served, "app~template"), autocommit=True) as editor:
            editor.execute("CREATE TABLE t2 (n int)")
        second = [threads.submit(use, number) for number in range(10)]
        assert {future.result(60) for future in first} <= {1, 2}
        assert {future.result(60) for future in second} == {2}
        assert keeper.execute(TABLES).fetchone() == (1,)


def test_several_users_open_a_session_in_a_server_at_once(daemon: DaemonType) -> None:
    served = daemon("--isolation", "cluster", "--role-attributes", "NOSUPERUSER")
    for turn in range(4):
        barrier = threading.Barrier(5)

        def open_session(
            number: int, turn: int = turn, barrier: threading.Barrier = barrier
        ) -> object:
            barrier.wait()
            return one(at(served, f"test~s{turn}", f"user{number % 2}"), "SELECT 1")

        with ThreadPoolExecutor(5) as threads:
            assert list(threads.map(open_session, range(5))) == [1] * 5


@BOTH
def test_clones_get_the_settings_of_the_templates_database(
    daemon: DaemonType, isolation: str, tmp_path: Path
) -> None:
    (tmp_path / "a.sql").write_text(
        "CREATE ROLE reader LOGIN; ALTER DATABASE app SET search_path = shop, public;"
        "ALTER ROLE reader IN DATABASE app SET work_mem = '77MB';"
        "REVOKE CONNECT ON DATABASE app FROM PUBLIC; GRANT CONNECT ON DATABASE app TO reader;"
        "CREATE ROLE stranger LOGIN;"
    )
    served = daemon("--isolation", isolation, "--template", f"app={tmp_path / 'a.sql'}")
    assert one(at(served, "app"), "SHOW search_path") == "shop, public"
    assert one(at(served, "app", "reader"), "SHOW work_mem") == "77MB"
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        psycopg.connect(at(served, "app", "stranger"))


@pytest.mark.slow
def test_the_time_limit_starts_when_a_lease_has_a_database(daemon: DaemonType) -> None:
    """The time in which a client waits for a database does not count."""
    served = daemon("--max-databases", "1", "--ttl", "1.5")
    first = psycopg.connect(at(served, "test"))
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(psycopg.connect, at(served, "test"))
        time.sleep(1)  # part of a lease's time limit, not a wait for an event
        first.close()
        second = waiting.result(10)
        time.sleep(0.8)
        assert second.execute("SELECT 1").fetchone() == (1,)
        second.close()


def test_a_waiting_client_does_not_fill_the_daemons_memory(daemon: DaemonType) -> None:
    served = daemon("--max-databases", "1", "--wait", "600")
    held = psycopg.connect(at(served, "test"))
    with socket.create_connection(("127.0.0.1", served.port)) as waiting:
        waiting.settimeout(1)
        waiting.sendall(startup_message({"user": "postgres", "database": "test"}))
        before = _resident_bytes(served.process.pid)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 200 << 20:
                sent += waiting.send(bytes(1 << 20))
        assert _resident_bytes(served.process.pid) - before < 20 << 20
    held.close()


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_background_processes_of_a_template_command_are_stopped(daemon: DaemonType) -> None:
    """The template is ready when the command exits; processes that it left are stopped."""
    command = f"sleep 60{os.getpid()}"
    daemon("--template", f"app=cmd:{command} & true")
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert command not in running.stdout.splitlines()


def test_a_reset_connection_ends_the_lease(daemon: DaemonType) -> None:
    served = daemon("--max-databases", "1")
    for _ in range(5):
        client = socket.create_connection(("127.0.0.1", served.port))
        client.sendall(startup_message({"user": "postgres", "database": "test"}))
        assert client.recv(1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    assert one(at(served, "test"), "SELECT 1") == 1
