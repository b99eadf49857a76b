"""Build and read messages of the frontend/backend protocol. Sans-IO.

PostgreSQL docs, "Message Formats". All numbers are big-endian; a length includes itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

PROTOCOL_3 = 3 << 16
CANCEL_CODE = 80877102
SSL_CODE = 80877103
GSSENC_CODE = 80877104

# Bytes of a cancel key: the backend's pid and its secret, which is longer since protocol 3.2.
MIN_KEY, MAX_KEY = 4 + 4, 4 + 256

TERMINATE = b"X\x00\x00\x00\x04"


class ProtocolError(Exception):
    """The peer sent bytes that the protocol does not allow.

    Attributes:
        sqlstate: the SQLSTATE of the ErrorResponse to send; None if the peer does not speak the
            protocol at all, so that it could not read a response.
    """

    def __init__(self, message: str, sqlstate: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    """Build a typed message."""
    return kind + (len(payload) + 4).to_bytes(4, "big") + payload


def parse(statement: bytes) -> bytes:
    """Build a Parse message for the unnamed statement; the server infers the parameter types."""
    return frame(b"P", b"\x00" + statement + b"\x00\x00\x00")


def bind(*values: bytes) -> bytes:
    """Build a Bind message from the unnamed statement to the unnamed portal.

    The server plans the statement, but does not execute it.
    """
    texts = b"".join(len(value).to_bytes(4, "big") + value for value in values)
    return frame(b"B", b"\x00\x00\x00\x00" + len(values).to_bytes(2, "big") + texts + b"\x00\x00")


def _execute(statement: bytes) -> bytes:
    return parse(statement) + bind() + frame(b"E", b"\x00" + bytes(4))


def in_read_only_transaction(plan: bytes) -> bytes:
    """Wrap messages that plan a statement in a read-only transaction that is rolled back.

    The planner calls functions that are declared stable or immutable. Such a function may still
    write, or change a setting.
    """
    return _execute(b"BEGIN READ ONLY") + plan + _execute(b"ROLLBACK")


# Closes the unnamed portal and replaces the unnamed statement with an empty one.
FORGET = frame(b"C", b"P\x00") + parse(b"") + frame(b"S")
# Plans a query of a catalog that every user may read, and whose columns, operators and index have
# common types.
ANY_PLAN = parse(
    b"SELECT pg_catalog.count(*) FROM pg_catalog.pg_seclabel"
    b" WHERE objsubid OPERATOR(pg_catalog.=) $1::pg_catalog.int4"
    b" AND provider OPERATOR(pg_catalog.=) $2::pg_catalog.text"
) + bind(b"0", b"")


def untyped(code: int, payload: bytes = b"") -> bytes:
    """Build a start-up message, which has no type: StartupMessage, CancelRequest, SSLRequest."""
    return (len(payload) + 8).to_bytes(4, "big") + code.to_bytes(4, "big") + payload


def startup_message(parameters: Mapping[str, str], version: int = PROTOCOL_3) -> bytes:
    """Build a StartupMessage from parameters."""
    pairs = b"".join(
        _zero_terminated(name) + _zero_terminated(value) for name, value in parameters.items()
    )
    return untyped(version, pairs + b"\x00")


def cancel_request(key: bytes) -> bytes:
    """Build a CancelRequest; `key` is the backend's pid and its secret, as in BackendKeyData."""
    return untyped(CANCEL_CODE, key)


def _zero_terminated(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape") + b"\x00"


@dataclass(slots=True)
class Frames:
    """Splits a stream of typed messages into (type, payload), and buffers incomplete messages.

    Attributes:
        wanted: the types whose payload is stored; messages of other types are yielded without
            their payload. None means all types.
        most: the maximum number of bytes in the payload of a wanted message.
    """

    wanted: bytes | None = None
    most: int | None = None
    _head: bytearray = field(default_factory=bytearray)
    _payload: bytearray = field(default_factory=bytearray)
    _missing: int = 0
    _stores_payload: bool = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield the messages that `data` completes.

        Raises:
            ProtocolError: the length of a message is invalid or exceeds `most`.
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
            if self._stores_payload:
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
        self._stores_payload = self.wanted is None or self._head[:1] in self.wanted
        too_long = self._stores_payload and self.most is not None and self._missing > self.most
        if length < 4 or too_long:
            raise ProtocolError(f"invalid message length: {length}")
