"""The start-up of a connection, as conversations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgtemp.wire.messages import (
    GSSENC_CODE,
    PROTOCOL_3,
    SSL_CODE,
    ProtocolError,
    cancel_request,
    startup_message,
    untyped,
)
from pgtemp.wire.startup import (
    MAX_STARTUP,
    Cancel,
    Event,
    NeedMore,
    Negotiation,
    Reply,
    Startup,
    clip,
)

SSL, GSS = untyped(SSL_CODE), untyped(GSSENC_CODE)
HELLO = startup_message({"user": "me", "database": "app", "application_name": "x"})
text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=50)


def events(*chunks: bytes) -> list[Event]:
    """The events for a client that sends these chunks one after the other."""
    negotiation, found = Negotiation(), list[Event]()
    for chunk in chunks:
        negotiation.receive(chunk)
        while not isinstance(event := negotiation.next_event(), NeedMore):
            found.append(event)
            if isinstance(event, Startup | Cancel):
                return found
    return found


def one_by_one(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def test_a_plain_client() -> None:
    """A StartupMessage is read in full, with the bytes that were sent after it."""
    assert events(HELLO + b"Q...") == [
        Startup(PROTOCOL_3, {"user": "me", "database": "app", "application_name": "x"}, b"Q...")
    ]


@pytest.mark.parametrize("requests", [[SSL], [GSS], [SSL, GSS], [GSS, SSL]])
def test_encryption_is_refused_once_each_in_either_order(requests: list[bytes]) -> None:
    *replies, startup = events(*requests, HELLO)
    assert replies == [Reply(b"N")] * len(requests)
    assert isinstance(startup, Startup)


def test_bytes_after_an_encryption_request_are_fatal() -> None:
    """An attacker between client and daemon could have added them (CVE-2021-23222)."""
    with pytest.raises(ProtocolError) as caught:
        events(SSL + HELLO)
    assert caught.value.sqlstate == "08P01"


def test_ssl_twice_is_fatal() -> None:
    with pytest.raises(ProtocolError):
        events(SSL, SSL)


@pytest.mark.parametrize("size", [8, 36, 260])
def test_cancel_keys_of_every_size(size: int) -> None:
    """From 4 bytes after the pid to the 256 of protocol 3.2, with or without a request for SSL."""
    key = bytes(range(size % 256)) + bytes(size - size % 256)
    assert events(cancel_request(key)) == [Cancel(key)]
    assert events(SSL, cancel_request(key))[-1] == Cancel(key)


@given(st.dictionaries(text.filter(bool), text, max_size=8), st.binary(max_size=20))
def test_chunk_boundaries_do_not_matter(parameters: dict[str, str], rest: bytes) -> None:
    """Byte by byte or in one piece, the parameters are the same, and can be sent again."""
    message = startup_message({**parameters, "user": "me"})
    (whole,) = events(message)
    (slow,) = events(*one_by_one(message))
    assert whole == slow
    assert isinstance(whole, Startup)
    assert startup_message(whole.parameters, whole.version) == message
    (with_rest,) = events(message + rest)
    assert isinstance(with_rest, Startup) and with_rest.rest == rest


@given(st.binary(max_size=200))
def test_garbage_never_raises_anything_else(data: bytes) -> None:
    """Any bytes give an event or a ProtocolError, even byte by byte."""
    for chunks in ([data], one_by_one(data)):
        try:
            events(*chunks)
        except ProtocolError:
            pass


@given(st.binary(max_size=60))
def test_a_startup_with_a_garbled_body_never_raises_anything_else(body: bytes) -> None:
    try:
        events(untyped(PROTOCOL_3, body))
    except ProtocolError as error:
        assert error.sqlstate in ("08P01", "28000")


@pytest.mark.parametrize(
    ("data", "sqlstate"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", None),
        (b"\x16\x03\x01\x02\x00", None),
        (b"\x00\x00\x00\x04", None),
        ((MAX_STARTUP + 1).to_bytes(4, "big"), "08P01"),
        (untyped(2 << 16, b"x"), "0A000"),
        (untyped(4 << 16, b"x"), "0A000"),
        (untyped(PROTOCOL_3, b"user\0me\0"), "08P01"),
        (untyped(PROTOCOL_3, b"user\0me"), "08P01"),
        (untyped(PROTOCOL_3, b"user\0\0"), "08P01"),
        (untyped(PROTOCOL_3, b"database\0x\0\0"), "28000"),
        (untyped(PROTOCOL_3, b"\0"), "28000"),
        (untyped(PROTOCOL_3, b"user\0me\0\0x\0\0"), "08P01"),
    ],
)
def test_invalid_start_ups(data: bytes, sqlstate: str | None) -> None:
    """A client of the protocol gets an SQLSTATE; any other client gets no answer."""
    with pytest.raises(ProtocolError) as caught:
        events(data)
    assert caught.value.sqlstate == sqlstate


def test_protocol_3_2_and_later_minors_pass() -> None:
    for minor in (2, 9999):
        (event,) = events(startup_message({"user": "me", "_pq_.x": "1"}, PROTOCOL_3 + minor))
        assert isinstance(event, Startup) and event.version == PROTOCOL_3 + minor


def test_the_last_of_two_database_names_counts() -> None:
    body = b"user\0me\0database\0one\0database\0two\0\0"
    (event,) = events(untyped(PROTOCOL_3, body))
    assert isinstance(event, Startup) and event.dbname == "two"


def test_the_default_database_has_the_users_name() -> None:
    (event,) = events(startup_message({"user": "me"}))
    assert isinstance(event, Startup) and event.dbname == "me"


@pytest.mark.parametrize(
    ("name", "clipped"),
    [
        ("n" * 63, "n" * 63),
        ("n" * 64, "n" * 63),
        ("n" * 62 + "\u00e4", "n" * 62),
        ("n" * 61 + "\u00e4x", "n" * 61 + "\u00e4"),
        ("\u20ac" * 30, "\u20ac" * 21),
        ("\U0001f418" * 16, "\U0001f418" * 15),
    ],
)
def test_a_long_name_is_truncated_as_postgresql_does_it(name: str, clipped: str) -> None:
    """To at most 63 bytes of whole characters.

    A database's name is not truncated, since it may name a session.
    """
    (event,) = events(startup_message({"user": name, "database": name}))
    assert isinstance(event, Startup)
    assert (event.user, event.dbname) == (clipped, name)
    assert clip(name) == clip(clipped) == clipped
