"""Ports and peers, with real sockets."""

from __future__ import annotations

import os
import socket

import pytest

from pgtemp.host import ports


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.5", "::1"])
def test_this_machine(host: str) -> None:
    assert ports.loopback_addresses(host)


@pytest.mark.parametrize("host", ["192.0.2.1", "0.0.0.0", "::", "no.such.host.invalid", "a" * 300])
def test_not_this_machine(host: str) -> None:
    assert ports.loopback_addresses(host) == []


def test_a_taken_port_has_a_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert ports.bind_error("127.0.0.1", port)
        assert ports.holder(port).startswith(f"pid {os.getpid()} (")
    assert ports.bind_error("127.0.0.1", port) is None
    assert ports.holder(port) == ""


def test_the_peer_of_a_connection_is_its_user() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        accepted, peer = server.accept()
        with accepted:
            ours = accepted.getsockname()
            assert ports.peer_uid(peer, ours) == os.getuid()
            client.shutdown(socket.SHUT_WR)  # half-closed is still somebody
            assert ports.peer_uid(peer, ours) == os.getuid()
            assert ports.peer_uid(("127.0.0.2", peer[1]), ours) is None, "the whole endpoint counts"
            client.close()
            assert ports.peer_uid(peer, ours) is None, "a closed socket is nobody's"


def test_the_same_port_on_two_addresses_is_told_apart() -> None:
    """Somebody else's connection from the same port number is another row."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = server.getsockname()
        with socket.create_connection(target) as one, socket.socket() as two:
            two.bind(("127.0.0.3", one.getsockname()[1]))
            two.connect(target)
            for _ in range(2):
                accepted, peer = server.accept()
                with accepted:
                    assert ports.peer_uid(peer, accepted.getsockname()) == os.getuid()
