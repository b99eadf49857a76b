"""Many, silent, unresponsive or vanished clients: the daemon keeps serving and leaks nothing."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from pgtemp.wire.messages import frame, startup_message
from rawclient import CANCELED, Client, RefusedError, SqlError, cancel, dial, reset
from support import Daemon, eventually, own_memory

DaemonType = type[Daemon]
HELLO = startup_message({"user": "postgres", "database": "test"})


def files(served: Daemon) -> int:
    return len(list(Path(f"/proc/{served.process.pid}/fd").iterdir()))


def with_file_limit(option: str, number: int) -> tuple[str, ...]:
    """A command prefix that limits the number of files a program may have open."""
    return ("sh", "-c", f'ulimit {option} -n {number}; exec "$@"', "sh")


def serves(served: Daemon) -> bool:
    try:
        with psycopg.connect(served.uri) as connection:
            return connection.execute("SELECT 1").fetchone() == (1,)
    except psycopg.OperationalError:
        return False


@pytest.mark.parametrize("isolation", ["database", "cluster"])
def test_more_clients_than_files(daemon: DaemonType, isolation: str) -> None:
    """A client over the limit gets an error with a remedy; the connected ones can still cancel.

    When they have disconnected, the daemon serves new clients.
    """
    served = daemon("--isolation", isolation, before=with_file_limit("", 96))
    address = ("127.0.0.1", served.port)
    usual = files(served)
    with ExitStack() as connected:
        clients, refused = list[Client](), 0
        for _ in range(100):
            try:
                clients.append(connected.enter_context(Client(address, user="postgres")))
            except RefusedError as error:
                assert error.sqlstate == "53300"
                assert "the limit on open files allows no more" in str(error)
                refused += 1
        assert len(clients) > 5 and refused == 100 - len(clients)
        with pytest.raises(psycopg.OperationalError, match="ulimit -n"):
            psycopg.connect(served.uri, sslmode="disable")
        clients[0].ask("SELECT pg_sleep(600)")
        activity = Path(f"/proc/{int.from_bytes(clients[0].key[:4], 'big')}/cmdline")
        assert eventually(lambda: b"SELECT" in activity.read_bytes())
        cancel(address, clients[0].key)
        clients[0].canceled = True
        with pytest.raises(SqlError, match=CANCELED):
            clients[0].answer()
        assert all(one.query("SELECT 1") == [("1",)] for one in clients)
    assert eventually(lambda: serves(served))
    # For a while, the pool may have some more databases ready.
    assert eventually(lambda: files(served) <= usual + 20, 60), (usual, files(served))
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors


def test_silent_clients_that_take_all_files(daemon: DaemonType) -> None:
    """The last of them get an error. When all have disconnected, the daemon serves new clients."""
    served = daemon("--pool", "1", before=with_file_limit("", 96))
    with ExitStack() as held:
        silent = [held.enter_context(dial(("127.0.0.1", served.port))) for _ in range(200)]
        assert b"C53300\0" in silent[-1].recv(1000)
    assert eventually(lambda: serves(served))
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors


def test_the_daemon_raises_its_file_limit(daemon: DaemonType) -> None:
    """The daemon may open as many files as the hard limit allows."""
    served = daemon(before=with_file_limit("-S", 96))
    with ExitStack() as connected:
        for _ in range(60):
            client = Client(("127.0.0.1", served.port), user="postgres", database="test~s")
            connected.enter_context(client)
        assert client.query("SELECT 1") == [("1",)]


@pytest.mark.slow
def test_idle_clients_use_little_memory(daemon: DaemonType) -> None:
    """The daemon uses less than 32 kB per client, even after it has relayed megabytes for it."""
    served = daemon()
    with ExitStack() as connected:
        before = own_memory(served.process.pid)
        clients = [
            connected.enter_context(
                Client(("127.0.0.1", served.port), user="postgres", database="test~s")
            )
            for _ in range(300)
        ]
        assert (own_memory(served.process.pid) - before) / 300 < 32 << 10
        for client in clients:
            client.ask("SELECT repeat('x', 1000000)")
        for client in clients:
            client.answer()
        assert eventually(lambda: (own_memory(served.process.pid) - before) / 300 < 32 << 10)


def test_clients_that_disconnect_at_any_moment(daemon: DaemonType) -> None:
    """A client resets before, while or after it gets a database; each database is returned."""
    served = daemon("--max-databases", "3", "--wait", "30")
    # until the daemon has opened its permanent connections
    assert all(serves(served) for _ in range(12))
    usual = files(served)
    begin = frame(b"Q", b"BEGIN; SELECT 1\0")
    for turn in range(60):
        client = dial(("127.0.0.1", served.port))
        client.sendall((HELLO + begin)[: 20 * (turn % 8)] if turn % 2 else HELLO + begin)
        if turn % 3 == 0:
            client.shutdown(socket.SHUT_WR)
        if turn % 10 == 0:
            client.recv(1 + turn % 7 * 100)
        if turn % 4:
            reset(client)
        client.close()
    assert all(serves(served) for _ in range(6))
    assert eventually(lambda: files(served) <= usual + 6)
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors


@pytest.mark.slow
def test_a_client_that_never_reads_is_closed(daemon: DaemonType) -> None:
    """At its time limit the lease ends at once; some time later its socket is closed, too."""
    served = daemon("--ttl", "2", "--log-level", "info")
    assert serves(served)
    usual = files(served)
    large_query = frame(b"Q", b"SELECT repeat('x', 1000) FROM generate_series(1, 1000000)\0")
    with ExitStack() as held:
        for _ in range(20):
            not_reading = held.enter_context(dial(("127.0.0.1", served.port)))
            not_reading.sendall(HELLO + large_query)
        assert eventually(lambda: files(served) >= usual + 40)
        assert eventually(lambda: files(served) <= usual + 30)  # their databases are returned
        assert eventually(lambda: files(served) <= usual + 6, 90)
    assert served.end()[1].count("lived_s") == 21


def test_a_vanished_client_is_subject_to_the_time_limit(daemon: DaemonType) -> None:
    """A client that sent more than a busy backend reads, and vanished, loses its database."""
    served = daemon("--max-databases", "1", "--wait", "60", "--ttl", "3")
    _reset_with_queries(served, 50_000)
    assert serves(served)


@pytest.mark.slow
def test_a_vanished_client_is_not_waited_for(daemon: DaemonType) -> None:
    """Data of a reset client is passed on, but not for as long as its last query takes."""
    served = daemon("--max-databases", "1", "--wait", "90")
    _reset_with_queries(served, 22_000)
    assert serves(served)


def _reset_with_queries(served: Daemon, queries: int) -> None:
    """A client sends a long query and many others after it, and resets the connection."""
    busy = Client(("127.0.0.1", served.port), user="postgres", database="test")
    busy.ask("SELECT pg_sleep(600)")
    activity = Path(f"/proc/{int.from_bytes(busy.key[:4], 'big')}/cmdline")
    assert eventually(lambda: b"SELECT" in activity.read_bytes())
    busy.socket.sendall(frame(b"Q", b"SELECT 1\0") * queries)
    busy.reset()
