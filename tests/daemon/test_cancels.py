"""Cancels under load: each hits the statement that it was meant for, and no other, ever."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from rawclient import CANCELED, Client, SqlError, cancel, dial, read_to_the_end
from support import Daemon, eventually

DaemonType = type[Daemon]
Address = tuple[str, int]
FOREVER = "SELECT pg_sleep(600)"
KINDS = pytest.mark.parametrize(
    ("isolation", "number"),
    [
        ("database", 12),
        pytest.param("database", 100, marks=pytest.mark.slow),
        pytest.param("cluster", 12, marks=pytest.mark.slow),
    ],
)


@contextmanager
def clients(address: Address, number: int) -> Iterator[list[Client]]:
    """Clients, each in a lease of its own."""
    with ExitStack() as connected, ThreadPoolExecutor(16) as threads:
        yield list(
            threads.map(
                lambda _: connected.enter_context(
                    Client(address, user="postgres", database="test")
                ),
                range(number),
            )
        )


def activity(client: Client) -> Path:
    return Path(f"/proc/{int.from_bytes(client.key[:4], 'big')}/cmdline")


def run_forever(asked: list[Client]) -> None:
    """Let them run a statement each, and wait until all do."""
    for client in asked:
        client.ask(FOREVER)
    assert eventually(lambda: all(b"SELECT" in activity(one).read_bytes() for one in asked), 60)


def hit(client: Client) -> None:
    """A client's statement was canceled, once, and what it asks next is answered."""
    client.canceled = True
    with pytest.raises(SqlError, match=CANCELED):
        client.answer()
    client.canceled = False  # from now on it would be a violation
    assert client.query("SELECT 42") == [("42",)]


@KINDS
def test_a_hundred_cancels_at_once(daemon: DaemonType, isolation: str, number: int) -> None:
    """Two at each second client: those are hit, once, and their neighbours never."""
    served = daemon("--isolation", isolation)
    address = ("127.0.0.1", served.port)
    with clients(address, number) as crowd, ThreadPoolExecutor(number) as threads:
        for turn in range(4):
            run_forever(crowd)
            aimed_at = crowd[turn % 2 :: 2]
            others = [client for client in crowd if client not in aimed_at]
            together = threading.Barrier(2 * len(aimed_at))

            def shoot(client: Client, together: threading.Barrier = together) -> None:
                together.wait()
                cancel(address, client.key)

            for _ in threads.map(shoot, [*aimed_at, *aimed_at]):
                pass
            for _ in threads.map(hit, aimed_at):
                pass
            answered, _, _ = select.select([one.socket for one in others], [], [], 0)
            assert not answered
            for _ in threads.map(lambda one: cancel(address, one.key), others):
                pass
            for _ in threads.map(hit, others):
                pass


@KINDS
def test_what_follows_a_cancel_is_not_hit(daemon: DaemonType, isolation: str, number: int) -> None:
    """The cancel of a statement that may be over by then does nothing after it has returned."""
    served = daemon("--isolation", isolation)
    address = ("127.0.0.1", served.port)

    def race(client: Client) -> int:
        hits = 0
        for turn in range(20):
            client.ask(f"SELECT pg_sleep({turn % 5 * 0.001})")
            cancel(address, client.key)
            client.canceled = True
            try:
                client.answer()
            except SqlError as error:
                assert error.sqlstate == CANCELED
                hits += 1
            client.canceled = False
            assert client.query("SELECT sum(n) FROM generate_series(1, 2000) n") == [("2001000",)]
        return hits

    with clients(address, number) as crowd, ThreadPoolExecutor(8) as threads:
        run_forever(crowd[:1])
        assert sum(threads.map(race, crowd[1:])) > 0
        assert not select.select([crowd[0].socket], [], [], 0)[0]


@pytest.mark.slow
def test_cancels_while_leases_come_and_go(daemon: DaemonType) -> None:
    """For clients that leave at that moment, or have just come: those who stay are not hit."""
    served = daemon()
    address = ("127.0.0.1", served.port)

    def come_and_go(number: int) -> None:
        for turn in range(10):
            with Client(address, user="postgres", database="test") as client:
                client.ask(FOREVER)
                shooting = threading.Thread(target=cancel, args=(address, client.key))
                shooting.start()
                if (turn + number) % 2:
                    client.reset()
                shooting.join()

    with clients(address, 10) as stay, ThreadPoolExecutor(8) as threads:
        run_forever(stay)
        for _ in threads.map(come_and_go, range(8)):
            pass
        assert not select.select([one.socket for one in stay], [], [], 0)[0]
    assert "Traceback" not in served.end()[1]


@pytest.mark.parametrize("isolation", ["database", "cluster"])
def test_the_key_of_a_lease_that_is_over_is_nobodys(daemon: DaemonType, isolation: str) -> None:
    """Nor is it with the process id of another lease's backend, which may be the same one day."""
    served = daemon("--isolation", isolation, "--log-level", "info")
    address = ("127.0.0.1", served.port)
    with Client(address, user="postgres", database="test") as gone:
        gone.query("SELECT 1")
        gone.close()
    with clients(address, 3) as crowd:
        run_forever(crowd)
        for client in crowd:
            for key in (gone.key, client.key[:4] + gone.key[4:], gone.key[:4] + client.key[4:]):
                cancel(address, key)
        assert not select.select([one.socket for one in crowd], [], [], 0)[0]
        cancel(address, crowd[1].key)
        hit(crowd[1])
    assert served.end()[1].count("an unknown key") == 9


def test_who_cancels_hears_the_end_when_the_cancel_was_taken(daemon: DaemonType) -> None:
    """Also who hangs up on the daemon at once, and who says more than was asked for."""
    served = daemon()
    address = ("127.0.0.1", served.port)
    with Client(address, user="postgres", database="test") as client:
        for behind in (b"", b"more", bytes(100_000)):
            run_forever([client])
            with dial(address) as canceller:
                request = b"\0\0\0\x10\x04\xd2\x16\x2e" + client.key
                canceller.sendall(request + behind)
                assert read_to_the_end(canceller) == b""
            hit(client)
        run_forever([client])
        dial_and_go(address, client.key)
        hit(client)


def dial_and_go(address: Address, key: bytes) -> None:
    with dial(address) as canceller:
        canceller.sendall(b"\0\0\0\x10\x04\xd2\x16\x2e" + key)
