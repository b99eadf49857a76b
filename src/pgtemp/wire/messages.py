"""Messages of the frontend/backend protocol: frames built and read. Sans-IO.

PostgreSQL docs, 54.7 "Message Formats". All numbers are big-endian; a length counts itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

PROTOCOL_3 = 3 << 16
CANCEL_CODE = 80877102
SSL_CODE = 80877103
GSSENC_CODE = 80877104

# Bytes of what cancels: a backend's pid and its secret, which is longer from 3.2 on.
MIN_KEY, MAX_KEY = 4 + 4, 4 + 256

TERMINATE = b"X\x00\x00\x00\x04"


class ProtocolError(Exception):
    """The peer said something that the protocol does not allow.

    Attributes:
        sqlstate: what an ErrorResponse about it carries; None where the peer does not speak the
            protocol at all, so that there is nobody to answer.
    """

    def __init__(self, message: str, sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    """A typed message."""
    return kind + (len(payload) + 4).to_bytes(4, "big") + payload


def parse(statement: bytes) -> bytes:
    """Prepare the unnamed statement; types of parameters are as they are used."""
    return frame(b"P", b"\x00" + statement + b"\x00\x00\x00")


def bind(*values: bytes) -> bytes:
    """Make the unnamed portal of the unnamed statement; it is planned, but not executed."""
    texts = b"".join(len(value).to_bytes(4, "big") + value for value in values)
    return frame(b"B", b"\x00\x00\x00\x00" + len(values).to_bytes(2, "big") + texts + b"\x00\x00")


def _execute(statement: bytes) -> bytes:
    return parse(statement) + bind() + frame(b"E", b"\x00" + bytes(4))


def undone(plan: bytes) -> bytes:
    """Messages that plan a statement, so that nothing stays of it.

    The planner calls functions that say of themselves that they are stable or immutable; such a one
    may write all the same, or change a setting.
    """
    return _execute(b"BEGIN READ ONLY") + plan + _execute(b"ROLLBACK")


# After something was prepared and planned: it is replaced by an empty statement.
FORGET = frame(b"C", b"P\x00") + parse(b"") + frame(b"S")
# Plans a query of a catalog that anybody may read and that has columns, operators and an index of
# the usual types.
ANY_PLAN = parse(
    b"SELECT pg_catalog.count(*) FROM pg_catalog.pg_seclabel"
    b" WHERE objsubid OPERATOR(pg_catalog.=) $1::pg_catalog.int4"
    b" AND provider OPERATOR(pg_catalog.=) $2::pg_catalog.text"
) + bind(b"0", b"")


def untyped(code: int, payload: bytes = b"") -> bytes:
    """A message of the start-up, which has no type: StartupMessage, CancelRequest, SSLRequest."""
    return (len(payload) + 8).to_bytes(4, "big") + code.to_bytes(4, "big") + payload


def startup_message(parameters: Mapping[str, str], version: int = PROTOCOL_3) -> bytes:
    """A StartupMessage, from parameters."""
    pairs = b"".join(_zero(name) + _zero(value) for name, value in parameters.items())
    return untyped(version, pairs + b"\x00")


def cancel_request(key: bytes) -> bytes:
    """A CancelRequest; `key` is the backend's pid and its secret, as in BackendKeyData."""
    return untyped(CANCEL_CODE, key)


def _zero(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape") + b"\x00"


@dataclass(slots=True)
class Frames:
    """Cuts a stream of typed messages into (type, payload); keeps what is not whole yet.

    Attributes:
        wanted: types of which the payload is wanted; others are passed over, and come without.
            None is all.
        most: bytes that the payload of a wanted one may have.
    """

    wanted: bytes | None = None
    most: int | None = None
    _head: bytearray = field(default_factory=bytearray)
    _payload: bytearray = field(default_factory=bytearray)
    _missing: int = 0
    _keeps: bool = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The messages that `data` completes.

        Raises:
            ProtocolError: a length that cannot be.
        """
        at = 0
        while at < len(data):
            if len(self._head) < 5:
                begin = data[at : at + 5 - len(self._head)]
                self._head += begin
                at += len(begin)
                if len(self._head) < 5:
                    return
                self._begin()
            piece = min(self._missing, len(data) - at)
            if self._keeps:
                self._payload += data[at : at + piece]
            at += piece
            self._missing -= piece
            if not self._missing:
                whole = bytes(self._head[:1]), bytes(self._payload)
                self._head.clear()
                self._payload.clear()
                yield whole

    def _begin(self) -> None:
        length = int.from_bytes(self._head[1:], "big")
        self._missing = length - 4
        self._keeps = self.wanted is None or self._head[:1] in self.wanted
        too_long = self._keeps and self.most is not None and self._missing > self.most
        if length < 4 or too_long:
            raise ProtocolError(f"a message of length {length}")
