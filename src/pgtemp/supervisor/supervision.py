"""The owner's side of the supervisor, the helper process that starts and stops its servers.

`process.py` is the program of that process. It is started with the first server, while the image is
copied, and exits with the owner. A child that the owner forks does not share it: the child closes
its copies of the sockets, and starts a supervisor of its own with its first server.
"""

from __future__ import annotations

import atexit
import os
import select
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pgtemp.errors import WardenError
from pgtemp.host import processes
from pgtemp.supervisor.protocol import decode, encode

_ROOT = str(Path(__file__).resolve().parents[2])
_BOOT = (
    f"import sys; sys.path.append({_ROOT!r}); from pgtemp.supervisor.process import main; main()"
)
_ANSWER_SECONDS = 30.0
# The whole signal sequence for persisted data takes at most 70 s.
_STOP_SECONDS = 90.0
_END_SECONDS = 90.0


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


class Process:
    """A run directory under the supervisor, and the postmaster in it.

    One thread may start or stop it while others check whether it is running.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._buffer = bytearray()
        self.pid = 0
        self.exit_status: int | None = None
        self._stopped: list[str] | None = None
        self._reading = threading.Lock()
        _channels.add(channel)

    def fileno(self) -> int:
        """A descriptor that becomes readable when the supervisor sends a message."""
        return self._channel.fileno()

    def start(self, request: Request) -> None:
        """Request the postmaster's start; `await_started` returns the result.

        Raises:
            WardenError: the supervisor has exited.
        """
        self._send(asdict(request))

    def start_shelf(self, run_dir: Path, uid: int | None, gid: int | None) -> None:
        """Start a recycler (recycle_files.py) for a run directory; it exits with this process.

        Raises:
            WardenError: the supervisor has exited, or cannot start another process.
        """
        self._send({"shelf": str(run_dir), "uid": uid, "gid": gid, "ttl": None, "sweep": []})
        self.await_started()

    def set_cleanup(self, remove: Sequence[str], *, keep: bool) -> None:
        """Set the paths that are removed in the end, and whether the data is persisted.

        Raises:
            WardenError: the supervisor has exited.
        """
        self._send({"remove": list(remove), "keep": keep})

    def guard(self, leader: int, *, gently: bool) -> None:
        """Have a program's process group stopped when this process has exited.

        Args:
            leader: the pid of the program, which leads the group; 0 if it has exited.
            gently: let it clean up first.

        Raises:
            WardenError: the supervisor has exited.
        """
        self._send({"guard": leader, "gently": gently})

    def await_started(self) -> int:
        """Wait until the postmaster is forked, and return its pid.

        Raises:
            WardenError: it could not be forked, or the supervisor has exited.
        """
        deadline = time.monotonic() + _ANSWER_SECONDS
        while not self.pid:
            if not self._receive(deadline - time.monotonic()):
                raise WardenError("the supervisor did not answer", remedy=_REMEDY)
        return self.pid

    def wait(self, seconds: float) -> int | None:
        """Wait at most `seconds` for the postmaster's exit; its exit status, None while it runs."""
        if self.exit_status is None:
            self._receive(seconds)
        return self.exit_status

    def stop(self, *, keep: bool, remove: Sequence[str]) -> list[str]:
        """Stop the postmaster and remove the paths; return the signals that were needed.

        Raises:
            WardenError: the supervisor has exited, or the server could not be stopped.
        """
        try:
            return self._stop({"stop": "keep" if keep else "discard", "remove": list(remove)})
        finally:
            self.abandon()

    def halt(self) -> list[str]:
        """Shut the postmaster down cleanly; the supervisor still holds its run directory.

        Raises:
            WardenError: as for `stop`.
        """
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
            self._channel.sendall(encode(message))
        except OSError as error:
            raise WardenError(_EXITED, remedy=_REMEDY) from error

    def abandon(self) -> None:
        """Close the channel: the supervisor then stops the server and cleans up by itself."""
        self._channel.close()

    def _receive(self, seconds: float) -> bool:
        """Process the supervisor's messages of the next `seconds`; False if there was none."""
        descriptor = self._channel.fileno()
        if descriptor < 0:
            raise WardenError("the server was already stopped or abandoned", remedy=_REMEDY)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(max(0.0, seconds) * 1000):
            return False
        with self._reading:
            try:
                data = self._channel.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True  # another thread has received the message
            except OSError:
                data = b""
            if not data:
                raise WardenError(_EXITED, remedy=_REMEDY)
            self._process_messages(data)
        return True

    def _process_messages(self, data: bytes) -> None:
        self._buffer += data
        while (message := decode(self._buffer)) is not None:
            if "error" in message:
                raise WardenError(f"PostgreSQL could not be started: {message['error']}")
            self.pid = message.get("pid", self.pid)
            self.exit_status = message.get("exit", self.exit_status)
            if "stopped" in message:
                self._stopped = message["used"]


_EXITED = "the supervisor has exited"
_REMEDY = "start a new server; that also removes what this one has left behind"
_channels: weakref.WeakSet[socket.socket] = weakref.WeakSet()


class Supervisor:
    """The supervisor process of this process."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            argv = [sys.executable, "-I", "-S", "-c", _BOOT, str(os.getpid())]
            try:
                self._process = processes.start_detached(argv, stdin=theirs.fileno())
            except OSError as error:
                self._control.close()
                raise WardenError(
                    f"the supervisor could not be started with {sys.executable}: {error}",
                    remedy="sys.executable must be a Python interpreter that can be run",
                ) from error

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def hold(self, remove: Sequence[str], *, keep: bool, lease: int, log: int) -> Process:
        """Have paths removed when `stop` is called, or when this process has exited.

        Args:
            remove: the paths.
            keep: whether a server that is started in them is to be shut down cleanly.
            lease, log: descriptors; the supervisor gets duplicates.

        Raises:
            WardenError: the supervisor has exited.
        """
        ours, theirs = socket.socketpair()
        process = Process(ours)
        try:
            with theirs:
                process.set_cleanup(remove, keep=keep)
                socket.send_fds(self._control, [b"+"], [theirs.fileno(), lease, log])
        except OSError as error:
            ours.close()
            raise WardenError(_EXITED, remedy=_REMEDY) from error
        return process

    def end(self) -> None:
        """Let the supervisor stop all servers and exit, and wait for it."""
        self._control.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            pass  # it continues by itself

    def forget(self) -> None:
        """In a forked child: detach from the parent's supervisor without affecting it."""
        self._control.close()
        self._process.returncode = 0  # not this process's child, so no warning about it


_current: Supervisor | None = None
_lock = threading.Lock()


def current() -> Supervisor:
    """The supervisor of this process; started if none is running.

    Raises:
        WardenError: the supervisor could not be started.
    """
    global _current
    with _lock:
        if _current is None or not _current.alive:
            if _current is not None:
                _current.end()
            _current = Supervisor()
        return _current


@contextmanager
def guarded(
    remove: Sequence[str] = (), lock: int | None = None, *, gently: bool = False
) -> Iterator[Callable[[int], None]]:
    """Ensure that neither a program nor an incomplete directory of a block outlives this process.

    Args:
        remove: directories to remove if this process exits before the end of the block.
        lock: the descriptor of a lock that is to be held until they are removed.
        gently: let the program clean up first.

    Yields:
        A function to call with a program's pid (the program must lead its process group), and with
        0 once the program has exited.

    Raises:
        WardenError: the supervisor could not be started, or has exited.
    """
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        lease = nothing if lock is None else lock
        held = current().hold(remove, keep=False, lease=lease, log=nothing)
    finally:
        os.close(nothing)
    try:
        yield lambda leader: held.guard(leader, gently=gently)
    finally:
        with suppress(WardenError):  # the block is complete, so a guard is no longer needed
            held.guard(0, gently=gently)
            held.stop(keep=False, remove=[])


@atexit.register
def _end() -> None:
    global _current
    with _lock:
        if _current is not None:
            for channel in list(_channels):
                channel.close()
            _current.end()
            _current = None


def _after_fork() -> None:
    global _current, _lock
    _lock = threading.Lock()
    for channel in list(_channels):
        channel.close()
    if _current is not None:
        _current.forget()
        _current = None


os.register_at_fork(after_in_child=_after_fork)
