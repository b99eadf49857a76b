"""A server listens on each of its addresses, or does not start."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest

from pgtemp import PgTempDB, PgTempError
from pgtemp.host import ports


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `localhost` have two addresses, as on most machines."""
    if not ports._exists("::1"):
        pytest.skip("this machine has no IPv6")
    monkeypatch.setattr(ports, "addresses", lambda host: ["127.0.0.1", "::1"])


@pytest.fixture
def stranger() -> Iterator[int]:
    """A port on ::1 on which another process listens, which is free on 127.0.0.1."""
    with closing(socket.socket(socket.AF_INET6)) as listening:
        while True:
            listening.bind(("::1", 0))
            port = int(listening.getsockname()[1])
            if ports.bind_error("127.0.0.1", port) is None:
                break
        listening.listen()
        yield port


@pytest.mark.usefixtures("both")
def test_a_port_that_is_taken_on_one_address_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, stranger: int
) -> None:
    """Another process takes the second address after the port was chosen; a new one is chosen."""
    chosen = [stranger]
    free_port = ports.free_port
    monkeypatch.setattr(
        ports, "free_port", lambda *given: chosen.pop() if chosen else free_port(*given)
    )
    with PgTempDB.from_uri("postgresql://localhost/app") as db:
        assert not chosen and db.port != stranger
        for address in ("127.0.0.1", "::1"):
            password = db.password
            psycopg.connect(
                host=address, port=db.port, user=db.user, dbname="app", password=password
            ).close()


@pytest.mark.usefixtures("both")
def test_a_fixed_port_that_another_process_takes_meanwhile(
    monkeypatch: pytest.MonkeyPatch, stranger: int
) -> None:
    """The check before the start found it free; the server must not start on one address alone."""
    monkeypatch.setattr(ports, "bind_error", lambda address, port: None)
    with pytest.raises(PgTempError, match=f"took port {stranger} on ::1"):
        PgTempDB.from_uri(f"postgresql://localhost:{stranger}/app").start()


def test_free_port_is_free_on_all_addresses(stranger: int) -> None:
    for _ in range(20):
        port = ports.free_port("127.0.0.1", "::1")
        assert port != stranger and ports.bind_error("::1", port) is None


def test_an_address_that_the_machine_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """/etc/hosts may give `localhost` the address ::1 on a machine without IPv6."""
    monkeypatch.setattr(ports, "addresses", lambda host: ["127.0.0.1", "::1"])
    monkeypatch.setattr(ports, "_exists", lambda address: address == "127.0.0.1")
    assert ports.loopback_addresses("localhost") == ["127.0.0.1"]


def test_listens() -> None:
    """Only a listening socket of the process itself counts."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
        assert ports.listens("127.0.0.1", port, os.getpid())
        with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as other:
            assert not ports.listens("127.0.0.1", port, other.pid)
        assert not ports.listens("::1", port, os.getpid())
    assert not ports.listens("127.0.0.1", port, os.getpid())
