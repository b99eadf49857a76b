"""The user at the other end of a connection, with real sockets, by both queries of the kernel."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pgtemp.host import peer_credentials
from rawclient import from_port, reset, unused_port
from support import OTHER_UID, acting_as

Ask = Callable[[tuple[str, int], tuple[str, int]], int | None]


def ask_sock_diag(peer: tuple[str, int], ours: tuple[str, int]) -> int | None:
    """Query by sock_diag only."""
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW, peer_credentials._NETLINK_SOCK_DIAG
    ) as kernel:
        return peer_credentials._query_kernel(kernel, peer, ours)


WAYS = pytest.mark.parametrize("ask", [ask_sock_diag, peer_credentials._search_table])


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
            client.shutdown(socket.SHUT_WR)  # a half-closed connection still has a user
            assert ask(peer, ours) == os.getuid()
            assert ask(("127.0.0.2", peer[1]), ("127.0.0.1", ours[1])) is None, (
                "the whole endpoint counts"
            )
            client.close()
            assert ask(peer, ours) is None, "a closed socket has no user"


@WAYS
def test_an_ipv6_socket_that_is_connected_to_an_ipv4_address(ask: Ask) -> None:
    """Java connects in this way."""
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
def test_the_same_port_on_two_addresses_is_distinguished(ask: Ask) -> None:
    """Another connection from the same port number is another row of the kernel's table."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = server.getsockname()
        with socket.create_connection(target) as one, socket.socket() as two:
            two.bind(("127.0.0.3", one.getsockname()[1]))
            two.connect(target)
            for _ in range(2):
                accepted, peer = server.accept()
                with accepted:
                    assert ask(peer, accepted.getsockname()) == os.getuid()


def test_a_listener_on_the_peers_port_is_not_the_peer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert ask_sock_diag(other.getsockname(), server.getsockname()) is None


@WAYS
def test_a_client_in_the_handshake_is_not_the_peer(ask: Ask) -> None:
    """A process that has only sent a SYN may have the endpoints of an older connection."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        target = server.getsockname()
        with socket.create_connection(target), socket.socket() as waiting:
            waiting.setblocking(False)
            assert waiting.connect_ex(target) == errno.EINPROGRESS  # the queue is full
            assert waiting.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x02"  # SYN_SENT
            assert ask(waiting.getsockname(), target) is None


def use_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the kernel's single queries fail, so that the whole table is read."""

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
def test_a_port_that_another_client_uses_again(
    monkeypatch: pytest.MonkeyPatch, table: bool, half_closed: bool
) -> None:
    """The next connection from the same port is not mistaken for the one that was reset."""
    if table:
        use_table(monkeypatch)
    peers = peer_credentials.Peers()
    with connected() as (server, client, first):
        endpoint = client.getsockname()
        assert peers.uid(first) == os.getuid()
        if half_closed:
            client.shutdown(socket.SHUT_WR)
            assert peers.uid(first) == os.getuid()
        reset(client)
        with from_port(endpoint[1], server.getsockname()[1]), server.accept()[0] as second:
            assert peers.holder(endpoint, server.getsockname()) == os.getuid()
            assert peers.uid(first) is None and not peers.is_held(first)
            assert peers.uid(second) == os.getuid() and peers.is_held(second)
    peers.close()


@pytest.mark.parametrize("way", ["_query_kernel", "_search_table"])
def test_a_client_that_disconnects_during_the_query(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The answer counts only if the connection is still open after it."""
    if way == "_search_table":
        use_table(monkeypatch)
    ask = getattr(peer_credentials, way)
    peers = peer_credentials.Peers()
    with connected() as (_, client, accepted):

        def ask_and_leave(*question: object) -> object:
            answer = ask(*question)
            reset(client)
            return answer

        monkeypatch.setattr(peer_credentials, way, ask_and_leave)
        assert peers.uid(accepted) is None
    peers.close()


@WAYS
def test_the_peer_of_another_users_connection_is_that_user(ask: Ask) -> None:
    """The user that created the socket counts."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with acting_as(OTHER_UID):
            client = socket.create_connection(server.getsockname())
        with client, server.accept()[0] as accepted:
            assert ask(accepted.getpeername(), accepted.getsockname()) == OTHER_UID


@pytest.mark.parametrize("table", [False, True])
def test_the_overflow_uid_is_no_user(monkeypatch: pytest.MonkeyPatch, table: bool) -> None:
    """It stands for every user that the user namespace does not map; its connection is open."""
    if table:
        use_table(monkeypatch)
    peers = peer_credentials.Peers()
    with socket.create_server(("127.0.0.1", 0)) as server:
        with acting_as(peer_credentials.OVERFLOW_UID):
            client = socket.create_connection(server.getsockname())
        with client, server.accept()[0] as accepted:
            assert (
                peers.holder(client.getsockname(), server.getsockname())
                == peer_credentials.OVERFLOW_UID
            )
            assert peers.uid(accepted) is None
            assert peers.is_held(accepted)
    peers.close()


def test_the_table_is_read_if_the_query_fails() -> None:
    """Both give the same result; a socket that fails is not used again."""
    peers = peer_credentials.Peers()
    with connected() as (_, _client, accepted):
        assert peers.uid(accepted) == os.getuid()
        assert peers._kernel is not None
        peers._kernel.close()
        assert peers.uid(accepted) == os.getuid()
        assert peers._kernel is None
        assert peers.uid(accepted) == os.getuid()
        assert peers._kernel is not None
    peers.close()
