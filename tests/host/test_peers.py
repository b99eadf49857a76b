"""Who connects, with real sockets; by both ways of asking the kernel."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from pgtemp.host import peers

Ask = Callable[[tuple[str, int], tuple[str, int]], int | None]


def asked(peer: tuple[str, int], ours: tuple[str, int]) -> int | None:
    """By sock_diag alone."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, peers._NETLINK_SOCK_DIAG) as kernel:
        return peers._ask(kernel, peer, ours)


WAYS = pytest.mark.parametrize("ask", [asked, peers._look_up])


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


def test_without_the_kernels_answer_the_table_tells() -> None:
    """The two ways give the same; a socket that no longer works is not used again."""
    told = peers.Peers()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        accepted, peer = server.accept()
        with accepted:
            assert told.uid(peer, accepted.getsockname()) == os.getuid()
            assert told._kernel is not None
            told._kernel.close()
            assert told.uid(peer, client.getpeername()) == os.getuid()
            assert told._kernel is None
            assert told.uid(peer, client.getpeername()) == os.getuid()
            assert told._kernel is not None
    told.close()
