"""A peer that sends any number of messages makes no reader of the daemon's event loop work long."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme

from keyupdates import KeyUpdates
from pgtemp.wire.firststatement import FirstStatement
from pgtemp.wire.messages import Frames, ProtocolError, frame
from pgtemp.wire.replication import Inspection
from pgtemp.wire.replies import ClientStart, ServerStart
from pgtemp.wire.tls import Tls

MANY = 50_000
BEGIN = frame(b"Q", b"BEGIN\0")
LOGIN = 3  # records of a client's handshake: ClientHello, ChangeCipherSpec, Finished


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The first bytes of the messages that are split from a stream."""
    found = list[bytes]()
    begin = Frames._begin

    def count(frames: Frames) -> None:
        found.append(bytes(frames._head))
        begin(frames)

    monkeypatch.setattr(Frames, "_begin", count)
    return found


@pytest.mark.parametrize(
    ("flood", "read"),
    [
        *((frame(kind), 1) for kind in (b"d", b"c", b"f", b"p", b"X", b"\0")),
        (BEGIN + frame(b"d"), 2),
        *((one, 33) for one in (frame(b"S"), frame(b"H"), BEGIN, frame(b"P", b"\0BEGIN\0\0\0"))),
    ],
)
def test_a_client_that_never_sends_a_statement(
    messages: list[bytes], flood: bytes, read: int
) -> None:
    """The search ends at the first message of another kind, else after 32 messages."""
    first = FirstStatement()
    first.feed(flood * MANY)
    first.feed(flood)
    assert (len(messages), first.done, first.plan) == (read, True, b"")


def test_a_server_that_never_is_ready(messages: list[bytes]) -> None:
    """After 2000 messages it is not observed any more; its key is found before."""
    start = ServerStart()
    start.feed(frame(b"K", b"12345678") + frame(b"N") * MANY)
    start.feed(frame(b"Z", b"I"))
    assert len(messages) == 2000
    assert (start.key, start.done, start.ready, start.failed) == (b"12345678", True, False, False)


@pytest.mark.parametrize(("last", "ready"), [(frame(b"Z", b"I"), True), (frame(b"E"), False)])
def test_a_server_with_many_notices(last: bytes, ready: bool) -> None:
    start = ServerStart()
    start.feed(frame(b"N") * 1999)
    assert not start.done
    start.feed(last)
    assert (start.done, start.ready, start.failed) == (True, ready, not ready)


class Counted(bytes):
    """Bytes that count how often a part of them is taken."""

    taken = 0

    def __getitem__(self, at: Any) -> Any:
        self.taken += 1
        return super().__getitem__(at)


def test_a_client_that_sends_many_passwords() -> None:
    """The ninth counts as a use of the database; no byte after it is read."""
    client = ClientStart()
    client.feed(frame(b"p", b"secret") * 8)
    assert not client.used
    flood = Counted(frame(b"p") * MANY)
    client.feed(flood)
    client.feed(flood)
    assert client.used and flood.taken == 5


def test_messages_to_a_walsender(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that arrive whole are not inspected in pieces; their text is still checked."""
    monkeypatch.setattr(Inspection, "_inspect", None)
    for size in range(40):
        flood = (frame(b"d", b"Q" * size) + frame(b"Q", b"SELECT 1\0") + frame(b"H")) * 1000
        assert Inspection().feed(flood) == flood
    monkeypatch.undo()
    one = Inspection()
    assert one.feed(flood + frame(b"Q", b"BASE_BACKUP\0") + flood) == flood
    assert one.refused == "BASE_BACKUP"


# TLS


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and the client's."""
    authority = trustme.CA()
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    return server, client


@pytest.fixture
def ends(contexts: tuple[ssl.SSLContext, ssl.SSLContext], tmp_path: Path) -> tuple[Tls, KeyUpdates]:
    """Both ends of a connection after the handshake."""
    server, client = Tls(contexts[0], direct=False), KeyUpdates(contexts[1], tmp_path / "keys")

    def exchange(data: bytes) -> bytes:
        assert server.receive(data) == b""
        return server.take()

    exchange(client.handshake(exchange))
    return server, client


def test_key_updates_are_limited(ends: tuple[Tls, KeyUpdates]) -> None:
    """A client may send 100 records without data, whatever it sends between them."""
    server, client = ends
    for _ in range(100 - LOGIN):
        assert server.receive(client.update(1) + client.record(b"data")) == b"data"
    assert not server.ended
    with pytest.raises(ProtocolError, match="without data"):
        server.receive(client.update(1))
    assert server.ended and server.receive(client.record(b"data")) == b""


@pytest.mark.parametrize("at_once", [1000, 1 << 20])
def test_a_flood_of_key_updates(ends: tuple[Tls, KeyUpdates], at_once: int) -> None:
    """The daemon answers at most 16 more of them than the limit, and processes no other."""
    server, client = ends
    flood = client.update(2000)
    with pytest.raises(ProtocolError, match="without data"):
        for at in range(0, len(flood), at_once):
            server.receive(flood[at : at + at_once])
    assert 100 - LOGIN < len(server.take()) * 2000 / len(flood) <= 100 + 16


@pytest.mark.parametrize("at_once", [1, 999, 1 << 20])
def test_many_records_with_data(ends: tuple[Tls, KeyUpdates], at_once: int) -> None:
    """The smallest records are no flood, in pieces of any size."""
    server, client = ends
    sent = b"".join(client.record(b"%d" % (n % 10)) for n in range(2000))
    pieces = (sent[at : at + at_once] for at in range(0, len(sent), at_once))
    assert b"".join(map(server.receive, pieces)) == b"0123456789" * 200


def test_empty_records_are_limited(ends: tuple[Tls, KeyUpdates]) -> None:
    server, client = ends
    with pytest.raises(ProtocolError):
        server.receive(b"".join(client.record(b"") for _ in range(200)))


def test_a_handshake_without_end(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    """After 64 kB that do not complete it, it fails."""
    server = Tls(contexts[0], direct=False)
    hello = b"\x01\1\xff\xff" + b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0" + b"\xff\xff"
    server.receive(b"\x16\3\1\x40\0" + hello + bytes((1 << 14) - len(hello)))
    for _ in range(2):
        server.receive(b"\x16\3\1\x40\0" + bytes(1 << 14))
    assert not server.ended
    with pytest.raises(ProtocolError, match="without data"):
        server.receive(b"\x16\3\1\x40\0" + bytes(1 << 14))
    assert server.ended
