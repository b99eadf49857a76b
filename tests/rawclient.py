"""A client of the daemon that checks every byte: which answers it gets, and that it gets one.

Each wait has a deadline. A ViolationError is an event that no client of PostgreSQL may see. A
GoneError may happen to a client while servers are killed. Two more errors are for the messages of
PostgreSQL and of the daemon.
"""

from __future__ import annotations

import random
import socket
import struct
import time
from contextlib import suppress
from typing import Self

from pgtemp.host import ports
from pgtemp.wire.messages import TERMINATE, Frames, cancel_request, frame, startup_message

SECONDS = 60.0  # the deadline of every wait of a client
CANCELED = "57014"
Row = tuple[str | None, ...]


class ViolationError(AssertionError):
    """An event that must not happen to any client."""


class HangError(ViolationError):
    """No answer arrived before the deadline."""


class GoneError(Exception):
    """The connection was closed after the login; with the SQLSTATE, if there was one."""


class RefusedError(Exception):
    """An ErrorResponse instead of a login."""

    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__(f"{fields['C']} {fields['M']}")
        self.sqlstate = fields["C"]


class SqlError(Exception):
    """An ErrorResponse to a statement."""

    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__(f"{fields['C']} {fields['M']}")
        self.sqlstate = fields["C"]


def error_fields(payload: bytes) -> dict[str, str]:
    """The fields of an ErrorResponse, which must include those that every client reads."""
    if not payload.endswith(b"\0\0"):
        raise ViolationError(f"an ErrorResponse without terminator: {payload!r}")
    parts = payload[:-2].split(b"\0")
    fields = {part[:1].decode(): part[1:].decode() for part in parts}
    if not {"S", "V", "C", "M"} <= fields.keys() or len(fields["C"]) != 5 or not fields["M"]:
        raise ViolationError(f"an ErrorResponse without required fields: {fields}")
    return fields


def dial(address: tuple[str, int] | str) -> socket.socket:
    """Connect by TCP or by a unix socket's path, and send nothing."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    made = socket.socket(family)
    made.settimeout(SECONDS)
    try:
        made.connect(address)
    except OSError as error:
        made.close()
        raise ViolationError(f"cannot connect to {address}: {error}") from error
    return made


def from_port(port: int, server: int) -> socket.socket:
    """Connect from a port that another client may just have used."""
    made = socket.socket()
    made.settimeout(SECONDS)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("127.0.0.1", port))
    made.connect(("127.0.0.1", server))
    return made


def unused_port() -> int:
    """A free port that the kernel assigns to no client, as it assigns those from 32768 on."""
    while True:
        port = random.randrange(12000, 22000)
        if ports.bind_error("127.0.0.1", port) is None:
            return port


def reset(connection: socket.socket) -> None:
    """Close with a reset."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read_to_the_end(connection: socket.socket) -> bytes:
    """All bytes until the other side closes."""
    received = bytearray()
    try:
        while data := connection.recv(65536):
            received += data
    except TimeoutError as error:
        raise HangError(f"no more data arrived after {bytes(received[-80:])!r}") from error
    except ConnectionError:
        pass
    return bytes(received)


def cancel(address: tuple[str, int] | str, key: bytes) -> None:
    """Send a cancel request, and wait until it was processed."""
    with dial(address) as connection:
        with suppress(ConnectionError):
            connection.sendall(cancel_request(key))
        if answer := read_to_the_end(connection):
            raise ViolationError(f"a cancel request was answered: {answer!r}")


class Client:
    """One connection, logged in.

    Attributes:
        asked: when it began to connect, by time.monotonic().
        canceled: whether its statement may be canceled.
    """

    def __init__(self, address: tuple[str, int] | str, **parameters: str) -> None:
        """Raises RefusedError, or ViolationError if the daemon closes without an error message."""
        self.asked = time.monotonic()
        self.canceled = False
        self.key = b""
        self.socket = dial(address)
        self._frames = Frames()
        self._pending: list[tuple[bytes, bytes]] = []
        try:
            with suppress(ConnectionError):  # a refusal may arrive before all is sent
                self.socket.sendall(startup_message(parameters))
            self._log_in()
        except BaseException:
            self.socket.close()
            raise

    def _log_in(self) -> None:
        try:
            while True:
                kind, payload = self.next()
                if kind == b"K":
                    self.key = payload
                elif kind == b"Z":
                    return
                elif kind == b"E":
                    raise RefusedError(error_fields(payload))
        except GoneError as error:
            raise ViolationError(
                "closed without an error message before the login was complete"
            ) from error

    def next(self) -> tuple[bytes, bytes]:
        """The next message."""
        while not self._pending:
            try:
                data = self.socket.recv(65536)
            except TimeoutError as error:
                raise HangError("no message arrived") from error
            except ConnectionError as error:
                raise GoneError(str(error)) from error
            if not data:
                raise GoneError("closed")
            self._pending = list(self._frames.feed(data))
        return self._pending.pop(0)

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        try:
            self.socket.sendall(frame(kind, payload))
        except TimeoutError as error:
            raise HangError("the daemon did not read in time") from error
        except ConnectionError as error:
            raise GoneError(str(error)) from error

    def ask(self, statement: str) -> None:
        """Send a statement without waiting for the answer."""
        self.send(b"Q", statement.encode() + b"\0")

    def query(self, statement: str) -> list[Row]:
        """Raises SqlError, GoneError."""
        self.ask(statement)
        return self.answer()

    def answer(self) -> list[Row]:
        """The rows of the answer, until the server is ready again or expects COPY data."""
        rows, failed = [], None
        while True:
            kind, payload = self._next_or(failed)
            if kind == b"D":
                rows.append(_row(payload))
            elif kind == b"E":
                failed = SqlError(error_fields(payload))
                if failed.sqlstate == CANCELED and not self.canceled:
                    raise ViolationError("canceled by a request that was not meant for it")
            elif kind in (b"Z", b"G"):
                if failed is not None:
                    raise failed
                return rows

    def _next_or(self, failed: SqlError | None) -> tuple[bytes, bytes]:
        try:
            return self.next()
        except GoneError as error:
            raise GoneError(str(failed or error)) from error

    def close(self) -> None:
        """Send Terminate, and wait until the daemon closes the connection."""
        with suppress(OSError):
            self.socket.sendall(TERMINATE)
            self.socket.shutdown(socket.SHUT_WR)
        try:
            read_to_the_end(self.socket)
        finally:
            self.socket.close()

    def reset(self) -> None:
        reset(self.socket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def _row(payload: bytes) -> Row:
    values: list[str | None] = []
    at = 2
    for _ in range(int.from_bytes(payload[:2], "big")):
        size = int.from_bytes(payload[at : at + 4], "big", signed=True)
        at += 4
        values.append(None if size < 0 else payload[at : at + size].decode())
        at += max(0, size)
    return tuple(values)
