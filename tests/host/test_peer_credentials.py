"""The user at the other end of a connection, with real sockets; by both ways to ask the kernel."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pgtemp.host import peer_credentials
from rawclient import from_port, reset, unused_port
from support import STRANGER, acting_as

Ask = Callable[[tuple[str, int], tuple[str, int]], int | None]


def asked(peer: tuple[str, int], ours: tuple[str, int]) -> int | None:
    """By sock_diag alone."""
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW, peer_credentials._NETLINK_SOCK_DIAG
    ) as kernel:
        return peer_credentials._query_kernel(kernel, peer, ours)


WAYS = pytest.mark.parametrize("ask", [asked, peer_credentials._search_table])


@WAYS
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_peer_of_a_connection_is_its_user(ask: Ask, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        socket.create_server((address, 0), family=family) as server,
        socket.create_connection(server.getsockname()[:2]) as client,
    ):
        accepted, peer = server.accept()
        with accepted:
            ours, peer = accepted.getsockname()[:2], peer[:2]
            assert ask(peer, ours) == os.getuid()
            client.shutdown(socket.SHUT_WR)  # half-closed is still somebody
            assert ask(peer, ours) == os.getuid()
            assert ask(("127.0.0.2", peer[1]), ("127.0.0.1", ours[1])) is None, (
                "the whole endpoint counts"
            )
            client.close()
            assert ask(peer, ours) is None, "a closed socket is nobody's"


@WAYS
def test_an_ipv4_address_may_be_reached_through_an_ipv6_socket(ask: Ask) -> None:
    """As Java does."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_INET6) as client,
    ):
        client.connect(("::ffff:127.0.0.1", server.getsockname()[1]))
        accepted, peer = server.accept()
        with accepted:
            assert ask(peer, accepted.getsockname()) == os.getuid()
            client.close()
            assert ask(peer, accepted.getsockname()) is None


@WAYS
def test_the_same_port_on_two_addresses_is_told_apart(ask: Ask) -> None:
    """Somebody else's connection from the same port number is another row."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = server.getsockname()
        with socket.create_connection(target) as one, socket.socket() as two:
            two.bind(("127.0.0.3", one.getsockname()[1]))
            two.connect(target)
            for _ in range(2):
                accepted, peer = server.accept()
                with accepted:
                    assert ask(peer, accepted.getsockname()) == os.getuid()


def test_somebody_who_listens_on_the_peers_port_is_not_the_peer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert asked(other.getsockname(), server.getsockname()) is None


@WAYS
def test_a_client_in_the_handshake_is_not_the_peer(ask: Ask) -> None:
    """A process that has only sent its SYN may have the endpoints of an older connection."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        target = server.getsockname()
        with socket.create_connection(target), socket.socket() as waiting:
            waiting.setblocking(False)
            assert waiting.connect_ex(target) == errno.EINPROGRESS  # the queue is full
            assert waiting.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x02"  # SYN_SENT
            assert ask(waiting.getsockname(), target) is None


def by_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the kernel answers no single question."""

    def fail(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(peer_credentials, "_query_kernel", fail)


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket, socket.socket]]:
    """A server, a client, and the server's end of the client's connection."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        from_port(unused_port(), server.getsockname()[1]) as client,
        server.accept()[0] as accepted,
    ):
        yield server, client, accepted


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("half_closed", [False, True])
def test_a_port_that_another_client_has_taken_over(
    monkeypatch: pytest.MonkeyPatch, table: bool, half_closed: bool
) -> None:
    """The next connection from the same port says nothing about the one that was reset."""
    if table:
        by_table(monkeypatch)
    told = peer_credentials.Peers()
    with connected() as (server, client, first):
        endpoint = client.getsockname()
        assert told.uid(first) == os.getuid()
        if half_closed:
            client.shutdown(socket.SHUT_WR)
            assert told.uid(first) == os.getuid()
        reset(client)
        with from_port(endpoint[1], server.getsockname()[1]), server.accept()[0] as second:
            assert told.holder(endpoint, server.getsockname()) == os.getuid()
            assert told.uid(first) is None and not told.is_held(first)
            assert told.uid(second) == os.getuid() and told.is_held(second)
    told.close()


@pytest.mark.parametrize("way", ["_query_kernel", "_search_table"])
def test_a_client_that_leaves_while_the_kernel_is_asked(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The answer counts only if the connection is open after it."""
    if way == "_search_table":
        by_table(monkeypatch)
    ask = getattr(peer_credentials, way)
    told = peer_credentials.Peers()
    with connected() as (_, client, accepted):

        def ask_and_leave(*question: object) -> object:
            answer = ask(*question)
            reset(client)
            return answer

        monkeypatch.setattr(peer_credentials, way, ask_and_leave)
        assert told.uid(accepted) is None
    told.close()


@WAYS
def test_the_peer_of_another_users_connection_is_that_user(ask: Ask) -> None:
    """The user that made the socket counts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with acting_as(STRANGER):
            client = socket.create_connection(server.getsockname())
        with client, server.accept()[0] as accepted:
            assert ask(accepted.getpeername(), accepted.getsockname()) == STRANGER


@pytest.mark.parametrize("table", [False, True])
def test_the_overflow_uid_is_no_user(monkeypatch: pytest.MonkeyPatch, table: bool) -> None:
    """It stands for every user that the user namespace does not map; its connection is open."""
    if table:
        by_table(monkeypatch)
    told = peer_credentials.Peers()
    with socket.create_server(("127.0.0.1", 0)) as server:
        with acting_as(peer_credentials.OVERFLOW_UID):
            client = socket.create_connection(server.getsockname())
        with client, server.accept()[0] as accepted:
            assert (
                told.holder(client.getsockname(), server.getsockname())
                == peer_credentials.OVERFLOW_UID
            )
            assert told.uid(accepted) is None
            assert told.is_held(accepted)
    told.close()


def test_without_the_kernels_answer_the_table_tells() -> None:
    """The two ways give the same; a socket that no longer works is not used again."""
    told = peer_credentials.Peers()
    with connected() as (_, _client, accepted):
        assert told.uid(accepted) == os.getuid()
        assert told._kernel is not None
        told._kernel.close()
        assert told.uid(accepted) == os.getuid()
        assert told._kernel is None
        assert told.uid(accepted) == os.getuid()
        assert told._kernel is not None
    told.close()
