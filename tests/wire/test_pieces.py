"""Every reader of the protocol, with all divisions of the bytes and all announced lengths."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgtemp.wire.firststatement import FirstStatement
from pgtemp.wire.messages import (
    GSSENC_CODE,
    MAX_KEY,
    PROTOCOL_3,
    SSL_CODE,
    TERMINATE,
    Frames,
    ProtocolError,
    cancel_request,
    frame,
    startup_message,
    untyped,
)
from pgtemp.wire.replies import ClientStart, ServerStart, ended_by_crash, fatal
from pgtemp.wire.startup import Cancel, Negotiation, Reply, Startup

HUGE = (1 << 30).to_bytes(4, "big")
FAILED = "refused"
Pieces = Sequence[bytes]
Outcome = tuple[object, ...]


@st.composite
def cuts(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> tuple[bytes, list[bytes]]:
    """Bytes, and the same bytes in pieces, some of which may be empty."""
    data = draw(whole)
    places = sorted(draw(st.lists(st.integers(0, len(data)), max_size=10)))
    return data, [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


def one_by_one(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def stored_bytes(value: object) -> int:
    """The number of bytes that a reader stores."""
    if isinstance(value, bytes | bytearray):
        return len(value)
    if is_dataclass(value):
        return sum(stored_bytes(getattr(value, one.name)) for one in fields(value))
    return 0


def read(
    reader: Frames | ServerStart | ClientStart | FirstStatement, pieces: Iterable[bytes]
) -> Outcome:
    """The result of a reader for these pieces; it never stores more than has arrived."""
    found: list[object] = []
    arrived, before = 0, stored_bytes(reader)
    try:
        for piece in pieces:
            arrived += len(piece)
            found += reader.feed(piece) or ()
            assert stored_bytes(reader) <= arrived + before
    except ProtocolError:
        found.append(FAILED)
    if isinstance(reader, ServerStart):
        return found, reader.key, reader.done, reader.failed
    if isinstance(reader, FirstStatement):
        return found, reader.done, reader.plan
    return found, isinstance(reader, ClientStart) and reader.used


def negotiate(pieces: Iterable[bytes]) -> Outcome:
    """The result of the start-up of a client that sends these pieces, with the remaining bytes."""
    negotiation, found, pieces = Negotiation(), list[object](), iter(pieces)
    arrived = 0
    for piece in pieces:
        negotiation.receive(piece)
        arrived += len(piece)
        try:
            event = negotiation.next_event()
        except ProtocolError as error:
            return *found, FAILED, error.sqlstate
        assert stored_bytes(negotiation) <= arrived
        if isinstance(event, Reply):
            found.append(event)
        elif isinstance(event, Startup):
            assert stored_bytes(negotiation) == 0
            rest = event.rest + b"".join(pieces)
            return *found, event.version, event.parameters, rest
        elif isinstance(event, Cancel):
            return *found, event.key
    return *found, None


# Most messages have the right length, some an absurd one, and some bytes are no message at all.
kinds = st.sampled_from([bytes([letter]) for letter in b"RSKZENTDCpXQPB"])
messages = st.builds(frame, kinds, st.binary(max_size=40))
absurd = st.builds(lambda kind, size: kind + size, kinds, st.binary(min_size=4, max_size=4))
streams = st.lists(st.one_of(messages, absurd, st.binary(max_size=20)), max_size=8).map(b"".join)

READERS: list[Callable[[], Frames | ServerStart | ClientStart | FirstStatement]] = [
    Frames,
    lambda: Frames(wanted=b"KE"),
    lambda: Frames(wanted=b"KE", most=20),
    ServerStart,
    ClientStart,
    FirstStatement,
]


@pytest.mark.parametrize("reader", READERS)
@given(cut=cuts(streams))
def test_pieces_do_not_matter(
    reader: Callable[[], Frames | ServerStart | ClientStart | FirstStatement],
    cut: tuple[bytes, Pieces],
) -> None:
    """In one piece, in several, and byte by byte, a stream has the same result.

    No reader raises an error other than ProtocolError.
    """
    data, pieces = cut
    whole = read(reader(), [data])
    assert read(reader(), pieces) == whole
    assert read(reader(), one_by_one(data)) == whole


text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
starts = st.one_of(
    st.builds(
        startup_message,
        st.dictionaries(text, text, max_size=4).map(lambda more: {**more, "user": "me"}),
        st.integers((2 << 16) + 0xFFFF, PROTOCOL_3 + 0x10001),
    ),
    st.builds(cancel_request, st.binary(max_size=MAX_KEY + 2)),
    st.builds(untyped, st.just(PROTOCOL_3), st.binary(max_size=40)),
    st.builds(untyped, st.integers(0, 2**32 - 1), st.binary(max_size=10)),
    # 0x16 is TLS
    st.binary(max_size=40).filter(lambda data: data[:1] != b"\x16"),
)
requests = st.lists(st.sampled_from([SSL_CODE, GSSENC_CODE]).map(untyped), max_size=3)


@given(requests, cuts(st.builds(lambda start, rest: start + rest, starts, st.binary(max_size=20))))
def test_a_start_in_pieces(asked: list[bytes], cut: tuple[bytes, Pieces]) -> None:
    """A start-up in one piece and in many is the same, even after requests for encryption."""
    data, pieces = cut
    whole = negotiate([*asked, data])
    assert negotiate([*asked, *pieces]) == whole
    assert negotiate([*one_by_one(b"".join(asked)), *one_by_one(data)]) == whole


@given(st.binary(max_size=100), st.sampled_from([b"", fatal("57P01", "x"), frame(b"Z", b"I")]))
def test_any_end_of_a_stream_can_be_inspected(noise: bytes, end: bytes) -> None:
    assert ended_by_crash(noise + end) in (True, False)
    assert ended_by_crash(noise + frame(b"Z", b"I"))


def test_no_memory_is_allocated_for_announced_bytes() -> None:
    """A message of 1 GB that has just begun uses no memory in any reader."""
    tracemalloc.start()
    try:
        for make in READERS:
            for kind in (b"K", b"N", b"p", b"D"):
                read(make(), [kind + HUGE, b"x" * 100])
        negotiate([HUGE + bytes(100)])
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_unneeded_messages_are_not_stored() -> None:
    """Megabytes of notices before a server is ready are skipped, in pieces of any size."""
    start = ServerStart()
    notice = frame(b"N", bytes(10 << 20)) + frame(b"K", b"12345678")
    for at in range(0, len(notice), 100_001):
        start.feed(notice[at : at + 100_001])
        assert stored_bytes(start) <= 5 + MAX_KEY
    assert start.key == b"12345678" and not start.done


def test_a_reader_that_has_finished_stores_nothing() -> None:
    """Bytes after the end of a login, or after a client's first message, are ignored."""
    start = ServerStart()
    start.feed(frame(b"K", b"12345678") + frame(b"Z", b"I") + b"D" + HUGE + bytes(1000))
    start.feed(bytes(1000))
    assert (start.key, start.done) == (b"12345678", True)
    assert stored_bytes(start) - stored_bytes(ServerStart()) == len(b"12345678")
    client = ClientStart()
    for data in (b"Q" + HUGE + bytes(1000), bytes(1000)):
        client.feed(data)
    assert client.used and stored_bytes(client) <= len(TERMINATE)


@pytest.mark.parametrize("size", [MAX_KEY + 1, 1 << 30])
def test_a_key_that_is_too_long_is_an_error(size: int) -> None:
    """The longest keys have 256 bytes after the process id (protocol 3.2)."""
    with pytest.raises(ProtocolError):
        ServerStart().feed(b"K" + (size + 4).to_bytes(4, "big"))
    start = ServerStart()
    start.feed(frame(b"K", bytes(MAX_KEY)))
    assert start.key == bytes(MAX_KEY)
