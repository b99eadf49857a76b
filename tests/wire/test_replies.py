"""Messages that the daemon sends in place of a server, read by independent code."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgtemp.wire.messages import PROTOCOL_3, TERMINATE, Frames, ProtocolError, frame
from pgtemp.wire.replies import ClientStart, ServerStart, ended_by_crash, fatal, greeting


def test_a_fatal_error_carries_all_its_fields() -> None:
    ((kind, payload),) = Frames().feed(fatal("53300", "no room", hint="wait", detail="all taken"))
    fields = {part[:1]: part[1:] for part in payload.split(b"\0") if part}
    assert kind == b"E"
    assert fields == {
        b"S": b"FATAL", b"V": b"FATAL", b"C": b"53300",
        b"M": b"no room", b"D": b"all taken", b"H": b"wait",
    }  # fmt: skip


def test_a_greeting_negotiates_unknown_versions_and_extensions() -> None:
    """It names a newer minor version and an unknown extension, and a login follows."""
    answer = list(Frames().feed(greeting(PROTOCOL_3 + 9999, {"_pq_.new": "1"}, "18.1")))
    assert [kind for kind, _ in answer] == [b"v", b"R", b"S", b"S", b"K", b"Z"]
    assert answer[0][1] == (PROTOCOL_3 + 2).to_bytes(4, "big") + b"\0\0\0\1_pq_.new\0"
    assert next(kind for kind, _ in Frames().feed(greeting(PROTOCOL_3, {}, "18.1"))) == b"R"


@given(st.lists(st.tuples(st.sampled_from([b"S", b"N", b"R"]), st.binary(max_size=30)), max_size=6))
def test_the_key_is_found_at_any_position(before: list[tuple[bytes, bytes]]) -> None:
    """Byte by byte, the key of BackendKeyData and the end of the login are found."""
    stream = b"".join(frame(*one) for one in before) + frame(b"K", b"12345678") + frame(b"Z", b"I")
    start = ServerStart()
    for i in range(len(stream)):
        assert not start.done
        start.feed(stream[i : i + 1])
    assert start.done and start.key == b"12345678"


def test_a_refused_login_ends_without_a_key() -> None:
    start = ServerStart()
    start.feed(fatal("28000", "no"))
    assert start.done and start.key is None


def test_an_impossible_length_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        list(Frames().feed(b"Z\0\0\0\3"))


@pytest.mark.parametrize("chunks", [[], [TERMINATE], [b"X", b"\0\0", b"\0\4"], [b"X\0"]])
def test_a_client_that_only_disconnects_has_used_nothing(chunks: list[bytes]) -> None:
    start = ClientStart()
    for chunk in chunks:
        start.feed(chunk)
    assert not start.used


@pytest.mark.parametrize("chunks", [[b"Q"], [b"X\0\0\0\5"], [TERMINATE + b"Q"], [b"X", b"Y"]])
def test_any_other_message_counts_as_use(chunks: list[bytes]) -> None:
    start = ClientStart()
    for chunk in chunks:
        start.feed(chunk)
    assert start.used


NOTICE = frame(b"N", b"SWARNING\0C57P02\0Mterminating connection because of crash\0\0")
ROW = frame(b"D", b"\0\1\0\0\0\2ab")


@pytest.mark.parametrize(
    ("last", "closed"),
    [
        (frame(b"Z", b"I"), True),
        (ROW + frame(b"Z", b"T"), True),
        (NOTICE, True),
        (frame(b"Z", b"I") + NOTICE, True),
        (ROW + NOTICE, True),
        (b"", False),
        (ROW, False),  # more may follow, so nothing may be inserted here
        (ROW[:-1], False),
        (NOTICE[:-1], False),
        (NOTICE + ROW[:3], False),
        (fatal("57P01", "terminating connection due to administrator command"), False),
        (frame(b"N", b"SNOTICE\0C00000\0Mhello\0\0"), False),
    ],
)
def test_a_server_that_closed_without_a_reason(last: bytes, closed: bool) -> None:
    """It closed between two messages and sent no reason, so the daemon may add one."""
    assert ended_by_crash(last) is closed
