"""The owner's end of the warden: one helper process that starts and ends all of its servers.

The process is `process.py`. It is started with the first server, while the image is copied, and
ends with the owner. A child made by fork has no part in it: it closes its copies of the sockets,
and a server it starts gets a warden of its own.
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
# The whole ladder for kept data takes 70 s at the most.
_STOP_SECONDS = 90.0
_END_SECONDS = 90.0


@dataclass(frozen=True, slots=True)
class Request:
    """What a postmaster is started with."""

    argv: Sequence[str]
    env: Mapping[str, str]
    uid: int | None
    gid: int | None
    data_dir: str
    ttl: float | None
    sweep: Sequence[str]


class Process:
    """A home under the warden, and the postmaster in it.

    One thread may start or stop it while others look whether it lives.
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
        """A descriptor that can be read when there is news of the postmaster."""
        return self._channel.fileno()

    def start(self, request: Request) -> None:
        """Ask for the postmaster; `await_started` tells how that went.

        Raises:
            WardenError: the warden is gone.
        """
        self._send(asdict(request))

    def start_shelf(self, home: Path, uid: int | None, gid: int | None) -> None:
        """Ask for a process that looks after the shelf of a home; it ends with this one.

        Raises:
            WardenError: the warden is gone, or cannot have one more process.
        """
        self._send({"shelf": str(home), "uid": uid, "gid": gid, "ttl": None, "sweep": []})
        self.await_started()

    def settle(self, remove: Sequence[str], *, keep: bool) -> None:
        """Say anew what is to be removed in the end, and whether the data is kept.

        Raises:
            WardenError: the warden is gone.
        """
        self._send({"remove": list(remove), "keep": keep})

    def guard(self, leader: int, *, gently: bool) -> None:
        """Have a program ended when this process is gone, with all in its process group.

        Args:
            leader: its id; 0 is none any more.
            gently: let it clean up first.

        Raises:
            WardenError: the warden is gone.
        """
        self._send({"guard": leader, "gently": gently})

    def await_started(self) -> int:
        """The postmaster's pid, once it was forked.

        Raises:
            WardenError: it could not be, or the warden is gone.
        """
        deadline = time.monotonic() + _ANSWER_SECONDS
        while not self.pid:
            if not self._receive(deadline - time.monotonic()):
                raise WardenError("the warden did not answer", remedy=_REMEDY)
        return self.pid

    def wait(self, seconds: float) -> int | None:
        """Wait for the postmaster's end, at most so long; its exit status, None while it runs."""
        if self.exit_status is None:
            self._receive(seconds)
        return self.exit_status

    def stop(self, *, keep: bool, remove: Sequence[str]) -> list[str]:
        """End the postmaster and remove what is to be removed; the signals that it took.

        Raises:
            WardenError: the warden is gone, or the server could not be ended.
        """
        try:
            return self._end({"stop": "keep" if keep else "discard", "remove": list(remove)})
        finally:
            self.abandon()

    def halt(self) -> list[str]:
        """Shut the postmaster down cleanly; its directory stays, held by the warden.

        Raises:
            WardenError: as for `stop`.
        """
        return self._end({"stop": "keep", "remove": None})

    def _end(self, message: dict[str, Any]) -> list[str]:
        self._stopped = None
        self._send(message)
        deadline = time.monotonic() + _STOP_SECONDS
        while self._stopped is None:
            if not self._receive(deadline - time.monotonic()):
                raise WardenError(f"PostgreSQL (pid {self.pid}) could not be ended")
        return self._stopped

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._channel.sendall(encode(message))
        except OSError as error:
            raise WardenError("the warden is gone", remedy=_REMEDY) from error

    def abandon(self) -> None:
        """Let go of the server: the warden ends it as its request said."""
        self._channel.close()

    def _receive(self, seconds: float) -> bool:
        """Take in what the warden says within so many seconds; False when it said nothing."""
        descriptor = self._channel.fileno()
        if descriptor < 0:
            raise WardenError("the server was given up", remedy=_REMEDY)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(max(0.0, seconds) * 1000):
            return False
        with self._reading:
            try:
                data = self._channel.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True  # another thread was quicker, and has told
            except OSError:
                data = b""
            if not data:
                raise WardenError("the warden is gone", remedy=_REMEDY)
            self._take_in(data)
        return True

    def _take_in(self, data: bytes) -> None:
        self._buffer += data
        while (message := decode(self._buffer)) is not None:
            if "error" in message:
                raise WardenError(f"PostgreSQL could not be started: {message['error']}")
            self.pid = message.get("pid", self.pid)
            self.exit_status = message.get("exit", self.exit_status)
            if "stopped" in message:
                self._stopped = message["used"]


_REMEDY = "start a new server; what this one left is removed with the next start"
_channels: weakref.WeakSet[socket.socket] = weakref.WeakSet()


class Supervisor:
    """The helper process of this process."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            argv = [sys.executable, "-I", "-S", "-c", _BOOT, str(os.getpid())]
            try:
                self._process = processes.start_detached(argv, stdin=theirs.fileno())
            except OSError as error:
                self._control.close()
                raise WardenError(
                    f"the warden could not be started with {sys.executable}: {error}",
                    remedy="sys.executable must be a Python interpreter that can be run",
                ) from error

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def hold(self, remove: Sequence[str], *, keep: bool, lease: int, log: int) -> Process:
        """Have directories removed when `stop` is called, or when this process is gone.

        Args:
            remove: what is to be removed then.
            keep: whether a server that is started in them is to be shut down cleanly.
            lease, log: descriptors; the warden gets some of its own.

        Raises:
            WardenError: the warden is gone.
        """
        ours, theirs = socket.socketpair()
        process = Process(ours)
        try:
            with theirs:
                process.settle(remove, keep=keep)
                socket.send_fds(self._control, [b"+"], [theirs.fileno(), lease, log])
        except OSError as error:
            ours.close()
            raise WardenError("the warden is gone", remedy=_REMEDY) from error
        return process

    def end(self) -> None:
        """Let the warden end all servers and itself, and wait for it."""
        self._control.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            pass  # it goes on by itself

    def forget(self) -> None:
        """In a forked child: let go of the parent's warden without a word."""
        self._control.close()
        self._process.returncode = 0  # not this process's child, so no warning about it


_current: Supervisor | None = None
_lock = threading.Lock()


def current() -> Supervisor:
    """The warden of this process; started when there is none.

    Raises:
        WardenError: it could not be started.
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
    """Let nothing that a block does outlive this process: neither a program, nor what is half made.

    Args:
        remove: directories that go where this process is gone before the block has ended.
        lock: a descriptor; its lock is let go of only after that.
        gently: let the program clean up first.

    Yields:
        What is to be called with the id of a program, which leads its process group, and with 0
        when that has ended.

    Raises:
        WardenError: there is no warden.
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
        with suppress(WardenError):  # what is done is done, whoever guards it
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
