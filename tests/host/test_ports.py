"""Ports and local addresses, with real sockets."""

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


def test_the_holder_of_a_used_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert ports.bind_error("127.0.0.1", port)
        assert ports.holder(port).startswith(f"pid {os.getpid()} (")
    assert ports.bind_error("127.0.0.1", port) is None
    assert ports.holder(port) == ""
