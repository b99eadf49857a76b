"""Cancel requests under load: each cancels the statement it was sent for, and no other."""

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
    """Clients, each with its own lease."""
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


def run_forever(running: list[Client]) -> None:
    """Start one long statement per client, and wait until all of them run."""
    for client in running:
        client.ask(FOREVER)
    assert eventually(lambda: all(b"SELECT" in activity(one).read_bytes() for one in running), 60)


def expect_canceled(client: Client) -> None:
    """Check that a client's statement was canceled once, and that its next one is answered."""
    client.canceled = True
    with pytest.raises(SqlError, match=CANCELED):
        client.answer()
    client.canceled = False  # another cancellation from now on is a violation
    assert client.query("SELECT 42") == [("42",)]


@KINDS
def test_a_hundred_simultaneous_cancels(daemon: DaemonType, isolation: str, number: int) -> None:
    """Every second client gets two cancel requests.

    Each of these clients is canceled once, the other clients never.
    """
    served = daemon("--isolation", isolation)
    address = ("127.0.0.1", served.port)
    with clients(address, number) as connected_clients, ThreadPoolExecutor(number) as threads:
        for turn in range(4):
            run_forever(connected_clients)
            targets = connected_clients[turn % 2 :: 2]
            others = [client for client in connected_clients if client not in targets]
            barrier = threading.Barrier(2 * len(targets))

            def send_cancel(client: Client, barrier: threading.Barrier = barrier) -> None:
                barrier.wait()
                cancel(address, client.key)

            for _ in threads.map(send_cancel, [*targets, *targets]):
                pass
            for _ in threads.map(expect_canceled, targets):
                pass
            answered, _, _ = select.select([one.socket for one in others], [], [], 0)
            assert not answered
            for _ in threads.map(lambda one: cancel(address, one.key), others):
                pass
            for _ in threads.map(expect_canceled, others):
                pass


@KINDS
def test_a_late_cancel_does_not_affect_the_next_statement(
    daemon: DaemonType, isolation: str, number: int
) -> None:
    """A cancel request that arrives after its statement has ended has no effect."""
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

    with clients(address, number) as connected_clients, ThreadPoolExecutor(8) as threads:
        run_forever(connected_clients[:1])
        assert sum(threads.map(race, connected_clients[1:])) > 0
        assert not select.select([connected_clients[0].socket], [], [], 0)[0]


@pytest.mark.slow
def test_cancels_while_clients_connect_and_disconnect(daemon: DaemonType) -> None:
    """Cancel requests for clients that connect or leave do not affect other clients."""
    served = daemon()
    address = ("127.0.0.1", served.port)

    def connect_and_leave(number: int) -> None:
        for turn in range(10):
            with Client(address, user="postgres", database="test") as client:
                client.ask(FOREVER)
                sending = threading.Thread(target=cancel, args=(address, client.key))
                sending.start()
                if (turn + number) % 2:
                    client.reset()
                sending.join()

    with clients(address, 10) as staying, ThreadPoolExecutor(8) as threads:
        run_forever(staying)
        for _ in threads.map(connect_and_leave, range(8)):
            pass
        assert not select.select([one.socket for one in staying], [], [], 0)[0]
    assert "Traceback" not in served.end()[1]


@pytest.mark.parametrize("isolation", ["database", "cluster"])
def test_the_key_of_an_ended_lease_is_invalid(daemon: DaemonType, isolation: str) -> None:
    """It is invalid also with the process id of another lease's backend.

    The kernel may assign a process id again.
    """
    served = daemon("--isolation", isolation, "--log-level", "info")
    address = ("127.0.0.1", served.port)
    with Client(address, user="postgres", database="test") as ended:
        ended.query("SELECT 1")
        ended.close()
    with clients(address, 3) as connected_clients:
        run_forever(connected_clients)
        for client in connected_clients:
            for key in (ended.key, client.key[:4] + ended.key[4:], ended.key[:4] + client.key[4:]):
                cancel(address, key)
        assert not select.select([one.socket for one in connected_clients], [], [], 0)[0]
        cancel(address, connected_clients[1].key)
        expect_canceled(connected_clients[1])
    assert served.end()[1].count("an unknown key") == 9


def test_a_cancel_connection_is_closed_once_the_cancel_was_processed(daemon: DaemonType) -> None:
    """A cancel also works if its client closes at once or sends more than the request."""
    served = daemon()
    address = ("127.0.0.1", served.port)
    with Client(address, user="postgres", database="test") as client:
        for behind in (b"", b"more", bytes(100_000)):
            run_forever([client])
            with dial(address) as canceller:
                request = b"\0\0\0\x10\x04\xd2\x16\x2e" + client.key
                canceller.sendall(request + behind)
                assert read_to_the_end(canceller) == b""
            expect_canceled(client)
        run_forever([client])
        cancel_and_close(address, client.key)
        expect_canceled(client)


def cancel_and_close(address: Address, key: bytes) -> None:
    with dial(address) as canceller:
        canceller.sendall(b"\0\0\0\x10\x04\xd2\x16\x2e" + key)
