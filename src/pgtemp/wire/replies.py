"""What the daemon says in a server's place, and what it learns from a server's first words.

Sans-IO. PostgreSQL docs, 54.7 "Message Formats", 54.8 "Error and Notice Message Fields".
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pgtemp.wire.messages import MAX_KEY, PROTOCOL_3, TERMINATE, Frames, frame

_LATEST = PROTOCOL_3 + 2
_READY = b"Z\x00\x00\x00\x05"  # the status follows
_TAKEN_ALONG = b"\x00C57P01\x00", b"\x00C57P02\x00"  # admin_shutdown, crash_shutdown
_PASSWORD = b"p"  # PasswordMessage, SASLInitialResponse, SASLResponse, GSSResponse


def fatal(sqlstate: str, message: str, *, detail: str = "", hint: str = "") -> bytes:
    """An ErrorResponse that ends a connection."""
    fields = {"S": "FATAL", "V": "FATAL", "C": sqlstate, "M": message, "D": detail, "H": hint}
    body = b"".join(
        name.encode() + text.replace("\0", "").encode("utf-8", "replace") + b"\x00"
        for name, text in fields.items()
        if text
    )
    return frame(b"E", body + b"\x00")


def greeting(version: int, parameters: dict[str, str], server_version: str) -> bytes:
    """A whole login as a server without a password would answer it, for who only looks in."""
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


def broke_off(last: bytes) -> bool:
    """Whether a server that ended after these bytes has crashed, with no message half said.

    Backends that a crash has taken along say so in a notice, if anything, which no program shows.
    """
    if last[-6:-1] == _READY:
        return True
    _, begin, rest = last.rpartition(b"N\x00\x00")
    notice = begin + rest
    whole = bool(begin) and len(notice) == 1 + int.from_bytes(notice[1:5], "big")
    return whole and any(code in notice for code in _TAKEN_ALONG)


@dataclass(slots=True)
class ServerStart:
    """Listens to a server until it is ready for a query, for the key that cancels.

    Attributes:
        done: whether it is ready, or has refused.
        failed: whether it has refused.
    """

    key: bytes | None = None
    done: bool = False
    failed: bool = False
    # Anything else, and however much of it, is not kept: a login trigger may say what it likes.
    _frames: Frames = field(default_factory=lambda: Frames(wanted=b"K", most=MAX_KEY))

    def feed(self, data: bytes) -> None:
        """Raises ProtocolError for what no server says."""
        if self.done:
            return
        for kind, payload in self._frames.feed(data):
            if kind == b"K":
                self.key = payload
            elif kind in (b"Z", b"E"):
                self.done, self.failed = True, kind == b"E"
                return


@dataclass(slots=True)
class ClientStart:
    """Listens to a client for its first word: a database that was not used can serve again."""

    used: bool = False
    _begin: bytes = b""
    _skip: int = 0

    def feed(self, data: bytes) -> None:
        at = 0
        while at < len(data) and not self.used:
            if self._skip:  # the rest of an answer to the server's question for a password
                skipped = min(self._skip, len(data) - at)
                self._skip -= skipped
                at += skipped
                continue
            self._begin += data[at : at + 1]
            at += 1
            if self._begin[:1] == _PASSWORD:
                if len(self._begin) == 5:
                    self._skip = max(0, int.from_bytes(self._begin[1:], "big") - 4)
                    self._begin = b""
            else:
                self.used = not TERMINATE.startswith(self._begin)
