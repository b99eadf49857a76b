"""Find a client's first statement, so that it can be planned for the next such client. Sans-IO.

PostgreSQL docs, "Message Flow", "Extended Query": Parse analyses a statement, Bind plans it, and
neither executes it. However, the planner calls functions; see `messages.in_read_only_transaction`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from pgtemp.wire.messages import Frames, ProtocolError, bind, frame, parse

_MAX_PAYLOAD = 8192  # bytes of a message that is stored
# Drivers send about ten messages up to the first Bind, with BEGIN and Describe.
_MAX_MESSAGES = 32
# Bind, Close, Describe, Execute, Flush, Parse, Query and Sync. PostgreSQL ignores CopyData outside
# of COPY, so a client can send any number of other messages, and never a statement.
_OF_A_STATEMENT = b"BCDEHPQS"
_TRANSACTION = re.compile(rb"\s*(begin|start\s+transaction)\b", re.IGNORECASE)
_PLANNED = re.compile(rb"\s*(select|insert|update|delete|merge|with|values|table)\b", re.IGNORECASE)


@dataclass(slots=True)
class FirstStatement:
    """Observes a client's messages up to its first statement; BEGIN is skipped.

    It reads a limited number of messages, since it runs on the daemon's event loop.

    Attributes:
        done: whether no more messages need to be observed.
        plan: protocol messages that plan the same statement, with the same values, as the unnamed
            statement; b"" if it cannot be planned before other statements have been executed.
    """

    done: bool = False
    plan: bytes = b""
    _messages: int = 0
    _name: bytes = b""
    _parsed: bytes = b""
    _frames: Frames = field(default_factory=lambda: Frames(wanted=b"QPB", most=_MAX_PAYLOAD))

    def feed(self, data: bytes) -> None:
        if self.done:
            return
        try:
            for kind, payload in self._frames.feed(data):
                self._messages += 1
                if kind not in _OF_A_STATEMENT or self._messages > _MAX_MESSAGES:
                    self.done = True
                elif kind == b"Q":
                    self._simple(payload[:-1])
                elif kind == b"P":
                    self._prepare(payload)
                elif kind == b"B" and self._parsed:
                    self._execute(payload)
                if self.done:
                    break
        except ProtocolError:
            self.done = True
        if self.done:
            self._frames, self._name, self._parsed = Frames(), b"", b""

    def _simple(self, text: bytes) -> None:
        several = b";" in text.rstrip(b"; \t\r\n")  # several statements cannot be prepared as one
        if several or not _TRANSACTION.match(text):
            self.done = True
            if _PLANNED.match(text) and not several:
                self.plan = parse(text) + bind()

    def _prepare(self, payload: bytes) -> None:
        name, _, statement = payload.partition(b"\x00")
        if _PLANNED.match(statement):
            self._name, self._parsed = name, frame(b"P", b"\x00" + statement)
        elif not _TRANSACTION.match(statement):
            self.done = True
        elif name == self._name:
            self._parsed = b""

    def _execute(self, payload: bytes) -> None:
        _portal, _, rest = payload.partition(b"\x00")
        name, _, values = rest.partition(b"\x00")
        self.done = True
        if name == self._name:
            self.plan = self._parsed + frame(b"B", b"\x00\x00" + values)
