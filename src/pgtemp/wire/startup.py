"""The start-up phase of a client's connection: one state machine over bytes. Sans-IO.

It answers SSLRequest and GSSENCRequest, starts TLS if the daemon supports it, and ends when a
CancelRequest or a StartupMessage has arrived. It makes no decision about databases. PostgreSQL
docs, "Message Flow", "Start-up".
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pgtemp.wire.messages import (
    CANCEL_CODE,
    GSSENC_CODE,
    MAX_KEY,
    MIN_KEY,
    SSL_CODE,
    ProtocolError,
)

MAX_STARTUP = 10_000  # bytes; PostgreSQL's MAX_STARTUP_PACKET_LENGTH
MAX_NAME = 63  # bytes; PostgreSQL's NAMEDATALEN - 1
_TLS_HANDSHAKE = 0x16


@dataclass(frozen=True, slots=True)
class Startup:
    """A StartupMessage. `rest` contains the bytes that the client sent directly after it."""

    version: int
    parameters: dict[str, str]
    rest: bytes

    @property
    def user(self) -> str:
        return self.parameters["user"]

    @property
    def dbname(self) -> str:
        """The database's name; if the client specifies none, PostgreSQL uses the user's name."""
        return self.parameters.get("database") or self.user


@dataclass(frozen=True, slots=True)
class Cancel:
    """A CancelRequest. `key` is the backend's pid followed by its secret."""

    key: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """Bytes to send to the client, which waits for them."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Secure:
    """The client speaks TLS after this event.

    Attributes:
        reply: the bytes that the client waits for; b"" if it started TLS directly, without a
            request.
        arrived: the TLS bytes that have already arrived.
    """

    reply: bytes
    arrived: bytes


@dataclass(frozen=True, slots=True)
class NeedMore:
    """No complete message has arrived yet."""


Event = Startup | Cancel | Reply | Secure | NeedMore


class NoTlsError(ProtocolError):
    """The client starts TLS directly, and the daemon has no certificate."""


@dataclass(slots=True)
class Negotiation:
    """Takes the bytes that arrive, and returns events. The last one is a Startup or a Cancel.

    Args:
        tls: whether the daemon supports TLS.
    """

    tls: bool = False
    _buffer: bytearray = field(default_factory=bytearray)
    _asked: set[int] = field(default_factory=set)

    def receive(self, data: bytes) -> None:
        self._buffer += data

    def next_event(self) -> Event:
        """Return the event for the bytes received so far.

        Raises:
            ProtocolError: the bytes do not start a PostgreSQL connection.
        """
        if self._buffer and self._buffer[0] == _TLS_HANDSHAKE:
            if not self.tls:
                raise NoTlsError("direct TLS, but no certificate is configured")
            return self._secure(b"")
        if len(self._buffer) < 4:
            return NeedMore()
        length = int.from_bytes(self._buffer[:4], "big")
        if not 8 <= length < 1 << 20:
            # An HTTP request or another protocol has a huge "length": the peer could not read an
            # ErrorResponse.
            raise ProtocolError(f"not PostgreSQL's protocol: {bytes(self._buffer[:16])!r}")
        check_length(length)
        if len(self._buffer) < length:
            return NeedMore()
        code = int.from_bytes(self._buffer[4:8], "big")
        body, rest = bytes(self._buffer[8:length]), bytes(self._buffer[length:])
        self._buffer.clear()
        if code in (SSL_CODE, GSSENC_CODE):
            self._check_request(code, body, rest)
            return self._secure(b"S") if self.tls and code == SSL_CODE else Reply(b"N")
        if code == CANCEL_CODE:
            if not MIN_KEY <= len(body) <= MAX_KEY:
                raise ProtocolError(f"invalid cancel request: the key has {len(body)} bytes")
            return Cancel(body)
        if code >> 16 != 3:
            raise ProtocolError(
                f"unsupported frontend protocol {code >> 16}.{code & 0xFFFF}: "
                "server supports 3.0 to 3.2",
                "0A000",
            )
        return Startup(code, _parameters(body), rest)

    def _secure(self, reply: bytes) -> Secure:
        """Start TLS. The caller decrypts the following bytes; TLS cannot be started again."""
        self.tls = False
        self._asked |= {SSL_CODE, GSSENC_CODE}
        arrived = bytes(self._buffer)
        self._buffer.clear()
        return Secure(reply, arrived)

    def _check_request(self, code: int, body: bytes, rest: bytes) -> None:
        if body:
            raise ProtocolError("invalid encryption request: unexpected message body")
        if rest:
            raise ProtocolError("received unencrypted data after encryption request", "08P01")
        if code in self._asked:
            raise ProtocolError("duplicate encryption request", "08P01")
        self._asked.add(code)


def check_length(length: int) -> None:
    """Raise ProtocolError if a StartupMessage is longer than servers accept."""
    if length > MAX_STARTUP:
        raise ProtocolError("invalid length of startup packet", "08P01")


def _parameters(body: bytes) -> dict[str, str]:
    """Parse the parameters of a StartupMessage; if a name occurs twice, its last value applies."""
    if not body.endswith(b"\x00"):
        raise ProtocolError("invalid startup packet layout: expected terminator", "08P01")
    if body == b"\x00":
        fields: list[bytes] = []
    else:
        if not body.endswith(b"\x00\x00"):
            raise ProtocolError("invalid startup packet layout: expected terminator", "08P01")
        fields = body[:-2].split(b"\x00")
    if len(fields) % 2:
        raise ProtocolError("invalid startup packet layout: name without a value", "08P01")
    texts = [part.decode("utf-8", "surrogateescape") for part in fields]
    parameters = dict(zip(texts[::2], texts[1::2], strict=True))
    if "" in parameters:
        raise ProtocolError("invalid startup packet layout: empty name", "08P01")
    if not parameters.get("user"):
        raise ProtocolError("no PostgreSQL user name specified in startup packet", "28000")
    for name in ("user", "database"):
        if not parameters.get(name, "").isprintable() and _undecodable(parameters[name]):
            raise ProtocolError(f"the name of the {name} is not valid UTF-8", "22021")
    parameters["user"] = clip(parameters["user"])
    return parameters


def clip(name: str) -> str:
    """Truncate a name as PostgreSQL does: to 63 bytes of whole characters (pg_mbcliplen).

    CREATE ROLE and CREATE DATABASE truncate names, and a login truncates the names in its
    StartupMessage.
    """
    return name.encode("utf-8", "surrogateescape")[:MAX_NAME].decode("utf-8", "ignore")


def _undecodable(text: str) -> bool:
    return any("\udc80" <= letter <= "\udcff" for letter in text)
