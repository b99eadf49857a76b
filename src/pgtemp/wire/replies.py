"""Messages that the daemon sends instead of a server, and observers of the start of a connection.

Sans-IO. PostgreSQL docs, "Message Formats", "Error and Notice Message Fields".
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pgtemp.wire.messages import MAX_KEY, PROTOCOL_3, TERMINATE, Frames, frame

_LATEST = PROTOCOL_3 + 2
_READY = b"Z\x00\x00\x00\x05"  # ReadyForQuery; the transaction status follows
_TERMINATED_BY_CRASH = b"\x00C57P01\x00", b"\x00C57P02\x00"  # admin_shutdown, crash_shutdown
# Messages that a server sends during a login and are observed: parameters, and notices of a login
# trigger. The server may be under the control of a client.
_MAX_MESSAGES = 2000
_MAX_PASSWORDS = 8  # messages of a login; SCRAM needs two
_PASSWORD = b"p"  # PasswordMessage, SASLInitialResponse, SASLResponse, GSSResponse


def fatal(sqlstate: str, message: str, *, detail: str = "", hint: str = "") -> bytes:
    """Build an ErrorResponse of severity FATAL."""
    fields = {"S": "FATAL", "V": "FATAL", "C": sqlstate, "M": message, "D": detail, "H": hint}
    body = b"".join(
        name.encode() + text.replace("\0", "").encode("utf-8", "replace") + b"\x00"
        for name, text in fields.items()
        if text
    )
    return frame(b"E", body + b"\x00")


def greeting(version: int, parameters: dict[str, str], server_version: str) -> bytes:
    """Build the response to a complete login without a password, for a client that only probes."""
    unknown = [name for name in parameters if name.startswith("_pq_.")]
    answer = b""
    if version > _LATEST or unknown:
        names = b"".join(name.encode("utf-8", "surrogateescape") + b"\x00" for name in unknown)
        newest = min(version, _LATEST).to_bytes(4, "big")
        answer += frame(b"v", newest + len(unknown).to_bytes(4, "big") + names)
    answer += frame(b"R", bytes(4))
    for name, value in (("server_version", server_version), ("client_encoding", "UTF8")):
        answer += frame(b"S", name.encode() + b"\x00" + value.encode() + b"\x00")
    return answer + frame(b"K", bytes(8)) + frame(b"Z", b"I")


def ended_by_crash(last: bytes) -> bool:
    """Whether a connection that closed after these bytes was closed by a crash of the server.

    A backend that is terminated because of a crash sends at most a notice, which client programs do
    not show. False if the last message is incomplete: an error could not be appended to it.
    """
    if last[-6:-1] == _READY:
        return True
    _, begin, rest = last.rpartition(b"N\x00\x00")
    notice = begin + rest
    whole = bool(begin) and len(notice) == 1 + int.from_bytes(notice[1:5], "big")
    return whole and any(code in notice for code in _TERMINATED_BY_CRASH)


@dataclass(slots=True)
class ServerStart:
    """Observes a server's messages until it is ready for a query, and stores its cancel key.

    Attributes:
        key: the cancel key, if the server has sent it.
        done: whether no more messages are observed: the server is ready, has refused the client, or
            has sent _MAX_MESSAGES.
        ready: whether the server is ready for a query.
        failed: whether the server has refused the client.
    """

    key: bytes | None = None
    done: bool = False
    ready: bool = False
    failed: bool = False
    _messages: int = 0
    # No other message is stored, whatever its length: a login trigger may send any notice.
    _frames: Frames = field(default_factory=lambda: Frames(wanted=b"K", most=MAX_KEY))

    def feed(self, data: bytes) -> None:
        """Observe more bytes. Raises ProtocolError for bytes that no server sends."""
        if self.done:
            return
        for kind, payload in self._frames.feed(data):
            self._messages += 1
            self.ready, self.failed = kind == b"Z", kind == b"E"
            self.done = self.ready or self.failed or self._messages == _MAX_MESSAGES
            if kind == b"K":
                self.key = payload
            if self.done:
                return


@dataclass(slots=True)
class ClientStart:
    """Observes whether a client sends a message besides passwords and Terminate.

    If it does not, its database is unused and can serve another client. More passwords than a login
    needs count as a use, so that a limited number of messages is read.
    """

    used: bool = False
    _begin: bytes = b""
    _passwords: int = 0
    _skip: int = 0

    def feed(self, data: bytes) -> None:
        at = 0
        while at < len(data) and not self.used:
            if self._skip:  # the rest of an answer to the server's password request
                skipped = min(self._skip, len(data) - at)
                self._skip -= skipped
                at += skipped
                continue
            self._begin += data[at : at + 1]
            at += 1
            if self._begin[:1] == _PASSWORD:
                if len(self._begin) == 5:
                    self._passwords += 1
                    self.used = self._passwords > _MAX_PASSWORDS
                    self._skip = max(0, int.from_bytes(self._begin[1:], "big") - 4)
                    self._begin = b""
            else:
                self.used = not TERMINATE.startswith(self._begin)
