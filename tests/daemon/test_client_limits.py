"""Clients that are many, silent, deaf or gone: the daemon goes on, and holds nothing for them."""

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


def limited(option: str, number: int) -> tuple[str, ...]:
    """What limits the files that a command may have open."""
    return ("sh", "-c", f'ulimit {option} -n {number}; exec "$@"', "sh")


def serves(served: Daemon) -> bool:
    try:
        with psycopg.connect(served.uri) as connection:
            return connection.execute("SELECT 1").fetchone() == (1,)
    except psycopg.OperationalError:
        return False


@pytest.mark.parametrize("isolation", ["database", "cluster"])
def test_more_clients_than_files(daemon: DaemonType, isolation: str) -> None:
    """Who is too many is told so, with a remedy; who is there can cancel; later all is well."""
    served = daemon("--isolation", isolation, before=limited("", 96))
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
    # The pool may keep some more ready for a while.
    assert eventually(lambda: files(served) <= usual + 20, 60), (usual, files(served))
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors


def test_silent_clients_that_take_all_files(daemon: DaemonType) -> None:
    """More than there are files for: the last are told, and when they go all is well."""
    served = daemon("--pool", "1", before=limited("", 96))
    with ExitStack() as held:
        crowd = [held.enter_context(dial(("127.0.0.1", served.port))) for _ in range(200)]
        assert b"C53300\0" in crowd[-1].recv(1000)
    assert eventually(lambda: serves(served))
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors


def test_as_many_files_as_the_system_allows(daemon: DaemonType) -> None:
    """The usual soft limit is not what decides."""
    served = daemon(before=limited("-S", 96))
    with ExitStack() as connected:
        for _ in range(60):
            client = Client(("127.0.0.1", served.port), user="postgres", database="test~s")
            connected.enter_context(client)
        assert client.query("SELECT 1") == [("1",)]


@pytest.mark.slow
def test_idle_clients_take_little(daemon: DaemonType) -> None:
    """Of the daemon, 32 kB each; also after megabytes have gone through their connections."""
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


def test_clients_that_are_gone_at_any_moment(daemon: DaemonType) -> None:
    """Reset before, while and after they are given a database: each is given back."""
    served = daemon("--max-databases", "3", "--wait", "30")
    assert all(serves(served) for _ in range(12))  # so that it has what it keeps open
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
def test_who_never_reads_is_given_up(daemon: DaemonType) -> None:
    """At its time limit the lease ends at once, and some time later its socket is closed, too."""
    served = daemon("--ttl", "2", "--log-level", "info")
    assert serves(served)
    usual = files(served)
    much = frame(b"Q", b"SELECT repeat('x', 1000) FROM generate_series(1, 1000000)\0")
    with ExitStack() as held:
        for _ in range(20):
            deaf = held.enter_context(dial(("127.0.0.1", served.port)))
            deaf.sendall(HELLO + much)
        assert eventually(lambda: files(served) >= usual + 40)
        assert eventually(lambda: files(served) <= usual + 30)  # their databases are given back
        assert eventually(lambda: files(served) <= usual + 6, 90)
    assert served.end()[1].count("lived_s") == 21


def test_the_time_of_who_is_gone_unseen_ends_too(daemon: DaemonType) -> None:
    """One who has sent more than a busy backend reads, and is gone, holds a database no longer."""
    served = daemon("--max-databases", "1", "--wait", "60", "--ttl", "3")
    _leave_behind(served, 50_000)
    assert serves(served)


@pytest.mark.slow
def test_who_is_gone_is_not_waited_for(daemon: DaemonType) -> None:
    """What a reset client has sent is passed on, but not for as long as its last query takes."""
    served = daemon("--max-databases", "1", "--wait", "90")
    _leave_behind(served, 22_000)
    assert serves(served)


def _leave_behind(served: Daemon, queries: int) -> None:
    """A query that takes long, and others behind it, of somebody who resets."""
    busy = Client(("127.0.0.1", served.port), user="postgres", database="test")
    busy.ask("SELECT pg_sleep(600)")
    activity = Path(f"/proc/{int.from_bytes(busy.key[:4], 'big')}/cmdline")
    assert eventually(lambda: b"SELECT" in activity.read_bytes())
    busy.socket.sendall(frame(b"Q", b"SELECT 1\0") * queries)
    busy.reset()
