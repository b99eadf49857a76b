"""The owner's end of a channel to the supervisor: one run directory, and the postmaster in it.

When the channel is closed, for whatever reason, the supervisor stops the server and removes the run
directory.
"""

from __future__ import annotations

import select
import socket
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pgtemp.errors import WardenError
from pgtemp.supervisor.protocol import decode, encode

_ANSWER_SECONDS = 30.0
# The whole signal sequence for persisted data takes at most 70 s.
_STOP_SECONDS = 90.0
_REMEDY = "start a new server; that also removes what this server left behind"

open_channels: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def exited() -> WardenError:
    """The error for a supervisor that has exited."""
    return WardenError("the supervisor has exited", remedy=_REMEDY)


@dataclass(frozen=True, slots=True)
class Request:
    """The parameters with which a postmaster is started."""

    argv: Sequence[str]
    env: Mapping[str, str]
    uid: int | None
    gid: int | None
    data_dir: str
    ttl: float | None
    sweep: Sequence[str]


class Channel:
    """A run directory under the supervisor, and the postmaster in it.

    One thread may start or stop it while others check whether it is running. All methods except
    `abandon` and `fileno` raise WardenError if the supervisor has exited.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._buffer = bytearray()
        self.pid = 0
        self.exit_status: int | None = None
        self._stopped: list[str] | None = None
        self._reading = threading.Lock()
        open_channels.add(connected)

    def fileno(self) -> int:
        """A descriptor that becomes readable when the supervisor sends a message."""
        return self._socket.fileno()

    def start(self, request: Request) -> None:
        """Request the postmaster's start; `await_started` returns the result."""
        self._send(asdict(request))

    def start_shelf(self, run_dir: Path, uid: int | None, gid: int | None) -> None:
        """Start a recycler (recycle_files.py) for a run directory; it exits with this process.

        Raises WardenError if the supervisor cannot start another process.
        """
        self._send({"recycled": str(run_dir), "uid": uid, "gid": gid, "ttl": None, "sweep": []})
        self.await_started()

    def set_cleanup(self, remove: Sequence[str], *, keep: bool) -> None:
        """Set the paths that are removed at the end, and whether the data is persisted."""
        self._send({"remove": list(remove), "keep": keep})

    def guard(self, leader: int, *, gently: bool) -> None:
        """Let the supervisor stop a program's process group when this process has exited.

        Args:
            leader: the pid of the program, which leads the group; 0 if it has exited.
            gently: whether the program may clean up before it is killed.
        """
        self._send({"guard": leader, "gently": gently})

    def await_started(self) -> int:
        """Wait until the postmaster is forked, and return its pid. Raises WardenError if not."""
        deadline = time.monotonic() + _ANSWER_SECONDS
        while not self.pid:
            if not self._receive(deadline - time.monotonic()):
                raise WardenError("the supervisor did not answer", remedy=_REMEDY)
        return self.pid

    def wait(self, seconds: float) -> int | None:
        """Wait at most `seconds` for the postmaster's exit; return its status, None if it runs."""
        if self.exit_status is None:
            self._receive(seconds)
        return self.exit_status

    def stop(self, *, keep: bool, remove: Sequence[str]) -> list[str]:
        """Stop the postmaster and remove the paths; return the signals that were needed.

        Raises WardenError if the server could not be stopped.
        """
        try:
            return self._stop({"stop": "keep" if keep else "discard", "remove": list(remove)})
        finally:
            self.abandon()

    def halt(self) -> list[str]:
        """Like `stop`, but cleanly, and the supervisor keeps the run directory."""
        return self._stop({"stop": "keep", "remove": None})

    def _stop(self, message: dict[str, Any]) -> list[str]:
        self._stopped = None
        self._send(message)
        deadline = time.monotonic() + _STOP_SECONDS
        while self._stopped is None:
            if not self._receive(deadline - time.monotonic()):
                raise WardenError(f"PostgreSQL (pid {self.pid}) could not be stopped")
        return self._stopped

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._socket.sendall(encode(message))
        except OSError as error:
            raise exited() from error

    def abandon(self) -> None:
        """Close the channel: the supervisor then stops the server and cleans up by itself."""
        self._socket.close()

    def _receive(self, seconds: float) -> bool:
        """Process the supervisor's messages for `seconds`; return False if there are none."""
        descriptor = self._socket.fileno()
        if descriptor < 0:
            raise WardenError("the server was already stopped or abandoned", remedy=_REMEDY)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(max(0.0, seconds) * 1000):
            return False
        with self._reading:
            try:
                data = self._socket.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True  # another thread has received the message
            except OSError:
                data = b""
            if not data:
                raise exited()
            self._buffer += data
            while (message := decode(self._buffer)) is not None:
                if "error" in message:
                    raise WardenError(f"PostgreSQL could not be started: {message['error']}")
                self.pid = message.get("pid", self.pid)
                self.exit_status = message.get("exit", self.exit_status)
                if "stopped" in message:
                    self._stopped = message["used"]
        return True
