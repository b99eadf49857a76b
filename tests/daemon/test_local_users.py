"""Other users of the machine: none is served over TCP, and none blocks the owner's clients.

The tests act as another user by setfsuid(2): the kernel reports the user that created a socket.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

import psycopg
import pytest
import uvloop

from pgtemp.daemon import listeners
from pgtemp.daemon.relay import Endpoint
from pgtemp.errors import OptionError
from pgtemp.host.peer_credentials import OVERFLOW_UID, Peers
from pgtemp.options.daemon import DaemonOptions
from pgtemp.wire.messages import SSL_CODE, frame, startup_message, untyped
from rawclient import SECONDS, dial, from_port, read_to_the_end, reset, unused_port
from support import OTHER_UID, Daemon, acting_as, eventually, many_files

DaemonType = type[Daemon]
Loop = Callable[[], asyncio.AbstractEventLoop]
HELLO = startup_message({"user": "intruder", "database": "test"})


def serves(served: Daemon) -> bool:
    """Whether the owner's client is served."""
    with psycopg.connect(served.uri, connect_timeout=30) as connection:
        return connection.execute("SELECT 1").fetchone() == (1,)


def dial_as(uid: int, port: int) -> socket.socket:
    with acting_as(uid):
        return dial(("127.0.0.1", port))


@contextmanager
def stopped(served: Daemon) -> Iterator[None]:
    """Stop the daemon during the block, so that it processes its events only afterwards."""
    served.process.send_signal(signal.SIGSTOP)
    state = Path(f"/proc/{served.process.pid}/stat")
    assert eventually(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
    try:
        yield
    finally:
        served.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("accepted", [False, True], ids=["queued", "accepted"])
def test_a_client_port_that_is_used_again(
    daemon: DaemonType, open_dir: Path, accepted: bool
) -> None:
    """A reset connection's statement never runs, even if the owner's next one has its port.

    The daemon is stopped in between, so that in each round it queries the kernel too late.
    """
    served = daemon("--log-level", "info")
    mark = open_dir / "mark"
    attack = HELLO + frame(b"Q", f"COPY (SELECT 1) TO '{mark}'".encode() + b"\0")
    for _ in range(20):
        port = unused_port()
        with ExitStack() as held:
            if accepted:
                with acting_as(OTHER_UID):
                    strangers = from_port(port, served.port)
                assert serves(served)  # so that the daemon has accepted the earlier connection
            held.enter_context(stopped(served))
            if not accepted:
                with acting_as(OTHER_UID):
                    strangers = from_port(port, served.port)
            strangers.sendall(attack)
            reset(strangers)
            owners = from_port(port, served.port)
            held.close()
        with owners:
            owners.sendall(startup_message({"user": "postgres", "database": "test"}))
            answer = b""
            while not answer.endswith(b"Z\0\0\0\x05I"):
                answer += owners.recv(1 << 16)
                assert answer[:1] == b"R"
    _, errors = served.end()
    assert not mark.exists()
    assert "intruder" not in errors, errors


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("others", [True, False])
def test_the_listener_checks_the_connection_that_is_served(loop: Loop, others: bool) -> None:
    """Neither event loop reads a peer's address again after the connection was reset."""

    async def check_connections(held: ExitStack) -> None:
        arrived: asyncio.Queue[Endpoint] = asyncio.Queue()
        server = await asyncio.get_running_loop().create_server(
            lambda: Endpoint(arrived.put_nowait), "127.0.0.1", 0
        )
        held.callback(server.close)
        target = server.sockets[0].getsockname()
        peers = Peers()
        held.callback(peers.close)
        listener = listeners.of_tcp(DaemonOptions(), peers, None)
        port = unused_port()
        with acting_as(OTHER_UID) if others else nullcontext():
            client = from_port(port, target[1])
        first = await arrived.get()
        held.callback(first.abort)
        assert (listener.refusal(first) is not None) == others
        reset(client)
        held.enter_context(from_port(port, target[1]))  # the loop has not seen the reset yet
        assert not first.transport.is_closing()
        refused = listener.refusal(first)
        assert refused is not None and "does not identify" in str(refused)
        second = await arrived.get()
        held.callback(second.abort)
        assert listener.refusal(second) is None
        second.abort()
        assert listener.refusal(second) is not None, "its descriptor may be another connection's"

    async def within_time() -> None:
        with ExitStack() as held:
            async with asyncio.timeout(SECONDS):
                await check_connections(held)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(within_time())


@pytest.mark.parametrize("uid", [OTHER_UID, OVERFLOW_UID])
def test_another_user_is_refused(daemon: DaemonType, uid: int) -> None:
    """The error has a remedy. The overflow uid identifies no user."""
    served = daemon()
    with dial_as(uid, served.port) as client:
        client.sendall(HELLO)
        answer = read_to_the_end(client)
    assert b"C28000\0" in answer and b"--password-file" in answer
    assert (b"does not identify" in answer) == (uid == OVERFLOW_UID)
    assert serves(served)


def test_a_daemon_of_the_overflow_uid(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot distinguish its own clients from others, so it refuses to listen over TCP."""
    monkeypatch.setattr("os.geteuid", lambda: OVERFLOW_UID)
    with pytest.raises(OptionError, match="cannot identify its clients") as caught:
        listeners.listen(DaemonOptions())
    assert "--password-file" in caught.value.remedy and "--no-tcp" in caught.value.remedy


SILENCE = {
    "nothing": b"",
    "one byte": HELLO[:1],
    "most of a startup": HELLO[:-1],
    "encryption asked for": untyped(SSL_CODE),
    "refused, and stays": HELLO,
    "encryption refused": untyped(SSL_CODE) + HELLO[:7],
}


@pytest.mark.parametrize("sent", SILENCE.values(), ids=SILENCE)
def test_silent_clients_of_another_user(daemon: DaemonType, sent: bytes) -> None:
    """They get a quarter of the daemon's capacity.

    Further ones are refused when they connect, and the owner's clients are served.
    """
    served = daemon()
    with many_files(), ExitStack() as held:
        for number in range(1, 1011):
            client = held.enter_context(dial_as(OTHER_UID, served.port))
            with suppress(ConnectionError):  # the daemon has refused it already
                client.sendall(sent)
            if number % 200 == 0:
                assert serves(served)
        assert b"C28000\0" in client.recv(1000)
        assert all(serves(served) for _ in range(5))
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors


def test_silent_clients_of_another_user_and_few_files(daemon: DaemonType) -> None:
    """If the daemon may open few files, the quarter is one of these files."""
    served = daemon("--pool", "1", before=("sh", "-c", 'ulimit -n 96; exec "$@"', "sh"))
    with ExitStack() as held:
        for _ in range(100):
            client = held.enter_context(dial_as(OTHER_UID, served.port))
        assert b"C28000\0" in client.recv(1000)
        assert serves(served)


def test_silent_clients_of_the_owner(daemon: DaemonType) -> None:
    """They may use more than a quarter of the capacity: none is refused."""
    served = daemon()
    with many_files(), ExitStack() as held:
        silent = [held.enter_context(dial(("127.0.0.1", served.port))) for _ in range(400)]
        assert serves(served)
        for client in silent:
            client.setblocking(False)
            with pytest.raises(BlockingIOError):
                client.recv(1)
