"""Decide which commands a client may send to the walsender of a shared server. Sans-IO.

PostgreSQL docs, "Streaming Replication Protocol". A walsender that is connected to a database
executes SQL and replication commands. BASE_BACKUP and physical replication read the whole server,
that is, the databases of all its clients; logical replication reads the connected database only.

A walsender accepts only the simple query protocol (`forbidden_in_wal_sender` in postgres.c), so
only Query messages are inspected. Like `replication_scanner_is_replication_command`
(repl_scanner.l), the inspection decides by the first token; that scanner does not skip comments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# Values of the parameter `replication`. PostgreSQL treats any other value as physical replication,
# or refuses it (ProcessStartupPacket in postmaster.c).
_NO_WALSENDER, _OF_A_DATABASE = ("", "false", "off", "no", "0"), "database"
_QUERY = b"Q"
_HEAD = 5  # bytes of a message's type and length
_MAX_HELD = 8192  # bytes of a Query that are held until its command is known
# White space: the characters that the scanner skips, and more. A false match can only refuse a
# command.
_SPACE = rb"[\x01-\x20]"
_WORD = rb"[A-Za-z_\x80-\xff][A-Za-z0-9_$\x80-\xff]*"
_SLOT = rb'(?:"(?:[^"]|"")+"%b*|%b%b+)' % (_SPACE, _WORD, _SPACE)
_FIRST = re.compile(rb"%b*(%b)?" % (_SPACE, _WORD))
_ALLOWED = re.compile(
    rb"%(s)b*(?:"
    rb"(?:IDENTIFY_SYSTEM|DROP_REPLICATION_SLOT|ALTER_REPLICATION_SLOT)(?!%(word)b)"
    rb"|CREATE_REPLICATION_SLOT%(s)b+%(slot)b(?:TEMPORARY%(s)b+)?LOGICAL(?!%(word)b)"
    rb"|START_REPLICATION%(s)b+SLOT%(s)b+%(slot)bLOGICAL(?!%(word)b)"
    rb")" % {b"s": _SPACE, b"slot": _SLOT, b"word": rb"[A-Za-z0-9_$\x80-\xff]"},
    re.IGNORECASE,
)
# Whole messages of other types with at most 27 bytes after the length, such as CopyData, which a
# client may send by the million. The server ignores them outside of COPY. The repetition is not
# possessive (*+): re in Python 3.11.2 reports a wrong end for it.
_OTHERS = re.compile(
    rb"(?s:[^Q]\0\0\0(?:%b))*" % b"|".join(b"\\x%02x%b" % (4 + n, b"." * n) for n in range(28))
)


@dataclass(slots=True)
class Inspection:
    """Inspects the bytes that a client sends to a walsender. After a refusal, no bytes pass.

    Attributes:
        refused: the command that was refused; "" if there was none.
    """

    refused: str = ""
    _held: bytearray = field(default_factory=bytearray)  # the beginning of a message
    _passing: int = 0  # remaining bytes of a message that pass without inspection

    def feed(self, data: bytes) -> bytes:
        """Return the bytes that may be sent to the server; a Query is held until its inspection."""
        passed, at = bytearray(), 0
        while at < len(data) and not self.refused:
            if not self._passing and not self._held and (end := _end_of_allowed(data, at)) > at:
                piece = data[at:end]
                passed += piece
            elif self._passing:
                piece = data[at : at + self._passing]
                self._passing -= len(piece)
                passed += piece
            else:
                piece = data[at : at + self._wanted() - len(self._held)]
                self._held += piece
                if len(self._held) == self._wanted():
                    passed += self._inspect()
            at += len(piece)
        return bytes(passed)

    def _wanted(self) -> int:
        """Return how many bytes of the message the inspection needs."""
        if len(self._held) < _HEAD or self._held[:1] != _QUERY:
            return _HEAD
        return _HEAD + max(0, min(self._length(), _MAX_HELD))

    def _length(self) -> int:
        # Without the four bytes of the length. The server closes a connection that sends a length
        # below four.
        return int.from_bytes(self._held[1:_HEAD], "big") - 4

    def _inspect(self) -> bytes:
        """Return the held bytes if they may pass, else b""."""
        held, length = bytes(self._held), self._length()
        if held[:1] == _QUERY:
            text, end, _ = held[_HEAD:].partition(b"\0")
            self.refused = refused(text, whole=bool(end) or length <= _MAX_HELD)
        self._held.clear()
        if self.refused:
            return b""
        self._passing = max(0, length - (len(held) - _HEAD))
        return held


def _end_of_allowed(data: bytes, begin: int) -> int:
    """Return the end of the whole messages from `begin` on that may pass.

    It takes less time than the inspection of pieces, since the event loop waits for it: a
    microsecond per Query, which the server answers, and much less per short message of other types.
    """
    while begin < len(data):
        others = _OTHERS.match(data, begin)
        assert others is not None  # the pattern matches no message
        begin = others.end()
        head = begin + _HEAD
        length = int.from_bytes(data[begin + 1 : head], "big") - 4
        end = head + length
        if head > len(data) or length < 0 or end > len(data):
            break
        if data.startswith(_QUERY, begin) and (
            length > _MAX_HELD or refused(data[head:end].partition(b"\0")[0])
        ):
            break
        begin = end
    return begin


def inspection(parameters: Mapping[str, str]) -> Inspection | None:
    """Return the inspection for a connection with these parameters; None if it has no walsender.

    For physical replication, the inspection is refused from the start.
    """
    asked = parameters.get("replication", "").lower()
    if asked in _NO_WALSENDER:
        return None
    return Inspection("" if asked == _OF_A_DATABASE else "physical replication")


def refused(text: bytes, *, whole: bool = True) -> str:
    """Return the replication command in a query if a shared server must not execute it.

    All replication commands except SHOW have an underscore in their first word, and no SQL
    statement has one, so the commands of later PostgreSQL versions are refused as well.

    Args:
        whole: whether the text contains the whole query.

    Returns:
        "" for SQL and for allowed commands.
    """
    first = _FIRST.match(text)
    assert first is not None  # the pattern matches the empty string
    word = first[1] or b""
    if not whole and first.end() == len(text):
        return f"a query that begins with more than {_MAX_HELD} bytes of white space"
    if (b"_" not in word and word.isascii()) or _ALLOWED.match(text):
        return ""
    return word.decode("ascii", "replace").upper()
