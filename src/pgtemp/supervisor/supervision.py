"""The owner's side of the supervisor, the helper process that starts and stops its servers.

`process.py` is the program of that process. It is started with the first server, while the image is
copied, and exits with the owner. A forked child of the owner does not share it: the child closes
its copies of the sockets, and starts its own supervisor with its first server.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pgtemp.errors import WardenError
from pgtemp.host import processes
from pgtemp.host.openat import Closing
from pgtemp.supervisor.channel import Channel, exited, open_channels

_ROOT = str(Path(__file__).resolve().parents[2])
_BOOT = (
    f"import sys; sys.path.append({_ROOT!r}); from pgtemp.supervisor.process import main; main()"
)
_SHUTDOWN_SECONDS = 90.0


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
                    remedy="set sys.executable to a Python interpreter that can be run",
                ) from error

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def hold(self, remove: Sequence[str], *, keep: bool, lease: int, log: int) -> Channel:
        """Let the supervisor remove paths when `stop` is called, or when this process has exited.

        Args:
            remove: the paths.
            keep: whether a server that is started in them must be shut down cleanly.
            lease, log: descriptors; the supervisor gets duplicates.

        Raises WardenError if the supervisor has exited.
        """
        ours, theirs = socket.socketpair()
        channel = Channel(ours)
        try:
            with theirs:
                channel.set_cleanup(remove, keep=keep)
                socket.send_fds(self._control, [b"+"], [theirs.fileno(), lease, log])
        except OSError as error:
            ours.close()
            raise exited() from error
        return channel

    def shut_down(self) -> None:
        """Let the supervisor stop all servers and exit, and wait for it."""
        self._control.close()
        try:
            self._process.wait(_SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            pass  # the supervisor continues by itself

    def detach(self) -> None:
        """In a forked child: detach from the parent's supervisor without affecting it."""
        self._control.close()
        self._process.returncode = 0  # prevents a warning; it is not a child of this process


_current: Supervisor | None = None
_lock = threading.Lock()


def current() -> Supervisor:
    """Return the supervisor of this process; start it if none is running. Raises WardenError."""
    global _current
    with _lock:
        if _current is None or not _current.alive:
            if _current is not None:
                _current.shut_down()
            _current = Supervisor()
        return _current


@contextmanager
def guarded(
    remove: Sequence[str] = (), lock: int | None = None, *, gently: bool = False
) -> Iterator[Callable[[int], None]]:
    """Ensure that neither a program nor an incomplete directory of a block outlives this process.

    Args:
        remove: directories to remove if this process exits before the end of the block.
        lock: the descriptor of a lock that is held until they are removed.
        gently: whether the program may clean up first.

    Yields:
        A function to call with a program's pid (the program must lead its process group), and with
        0 once the program has exited.

    Raises WardenError if the supervisor could not be started, or has exited.
    """
    with Closing(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)) as null:
        lease = null if lock is None else lock
        channel = current().hold(remove, keep=False, lease=lease, log=null)
    try:
        yield lambda leader: channel.guard(leader, gently=gently)
    finally:
        with suppress(WardenError):  # the block is complete, so a guard is no longer needed
            channel.guard(0, gently=gently)
            channel.stop(keep=False, remove=[])


def _close_channels() -> None:
    for channel in list(open_channels):
        channel.close()


@atexit.register
def _at_exit() -> None:
    global _current
    with _lock:
        if _current is not None:
            _close_channels()
            _current.shut_down()
            _current = None


def _after_fork() -> None:
    global _current, _lock
    _lock = threading.Lock()
    _close_channels()
    if _current is not None:
        _current.detach()
        _current = None


os.register_at_fork(after_in_child=_after_fork)
