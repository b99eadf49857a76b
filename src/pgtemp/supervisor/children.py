"""The child processes of the supervisor: a postmaster in its run directory, or a recycler.

The supervisor process imports this module, so it imports no module that is slow to import.
"""

from __future__ import annotations

import _socket
import os
import sys
import time

from pgtemp.host.removal import REMOVING
from pgtemp.supervisor import recycle_files
from pgtemp.supervisor.crash import libc, unblock
from pgtemp.supervisor.protocol import encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Iterator
    from typing import Any
else:
    import _signal

INT, QUIT, KILL = _signal.SIGINT, _signal.SIGQUIT, _signal.SIGKILL
CONT = _signal.SIGCONT
# The signals that stop a postmaster: (signal, its name, seconds to wait after it). If the data is
# discarded, no shutdown checkpoint is needed; the postmaster only needs a moment to remove its
# shared memory. If the data is persisted, the server gets the time that a checkpoint of a large
# cluster may take. A fast shutdown waits for all backends, so if some do not exit, each process of
# the server gets SIGCONT.
_SEQUENCES = {
    "discard": ((QUIT, "SIGQUIT", 2.0), (KILL, "SIGKILL", 5.0)),
    "keep": (
        (INT, "SIGINT", 1.0), (CONT, "SIGCONT", 59.0),
        (QUIT, "SIGQUIT", 5.0), (KILL, "SIGKILL", 5.0),
    ),
}  # fmt: skip
_PR_SET_PDEATHSIG = 1
_NICE = 5  # of a recycler: processes that create a database for a client take precedence
_MAX_FDS = 1 << 20


class Server:
    """One postmaster, from the request to start it to the removal of its run directory.

    An instance can also represent a recycler (recycle_files.py) instead of a postmaster; `log` is
    then the recycler's end of the socket to the owner.
    """

    def __init__(self, channel: _socket.socket, lease: int, log: int) -> None:
        self.channel: _socket.socket | None = channel
        self.lease, self.log = lease, log
        self.buffer = bytearray()
        self.spec: dict[str, Any] = {}
        self.pid = 0
        self.deadline: float | None = None
        self.steps: Iterator[tuple[int, str, float]] | None = None
        self.used: list[str] = []
        self.removed = False
        self.halting = False  # stop the postmaster, but keep its directory until the channel closes

    def send(self, **message: Any) -> None:
        if self.channel is not None:
            try:
                self.channel.send(encode(message))
            except OSError:
                pass  # the owner has exited; the closed channel is handled next

    def start(self) -> None:
        supervisor = os.getpid()
        try:
            self.pid = os.fork()
        except OSError as error:
            self.send(error=str(error))
            return
        else:
            if self.pid == 0:
                if "recycled" in self.spec:
                    self._become_recycler(supervisor)
                self._become_postmaster(supervisor)
            if "recycled" in self.spec:  # only the child may hold this end of the socket
                os.dup2(self.lease, self.log, inheritable=False)
        if self.spec["ttl"] is not None:
            self.deadline = time.monotonic() + self.spec["ttl"]
        self.send(pid=self.pid)

    def _become_postmaster(self, supervisor: int) -> None:
        """In the child: drop privileges, request the parent death signal, exec. Never returns."""
        spec = self.spec
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(self.log, 1)
            os.dup2(self.log, 2)
            # Python ignores these two signals, and exec preserves that.
            for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
                _signal.signal(number, _signal.SIG_DFL)
            self._become_user(QUIT)
            if os.getppid() == supervisor:
                os.execve(spec["argv"][0], spec["argv"], spec["env"])
        except BaseException as error:
            os.write(2, f"FATAL: {spec['argv'][0]} could not be run: {error}\n".encode())
        os._exit(127)

    def _become_recycler(self, supervisor: int) -> None:
        """In the child: drop privileges and restore recycled files. Never returns.

        It does not exec, because the server user may not be able to run this interpreter.
        """
        try:
            os.dup2(self.log, 0)
            os.closerange(3, _MAX_FDS)
            _signal.set_wakeup_fd(-1)
            _signal.signal(QUIT, lambda *_: os._exit(0))
            self._become_user(KILL)
            os.nice(_NICE)
            if os.getppid() == supervisor:
                recycle_files.serve(_socket.socket(fileno=0), self.spec["recycled"])
        finally:
            os._exit(0)

    def _become_user(self, death: int) -> None:
        """In a child: become the server user; get the signal `death` if the supervisor exits."""
        os.umask(0o077)
        if self.spec["uid"] is not None:
            os.setgroups([])
            os.setgid(self.spec["gid"])
            os.setuid(self.spec["uid"])
        if sys.platform == "linux":
            libc("prctl", _PR_SET_PDEATHSIG, death, 0, 0, 0)  # after setuid, which clears it

    def stop(self, sequence: str) -> None:
        if self.steps is None:
            self.steps = iter(_SEQUENCES[sequence])
            self.send_next_signal()

    def send_next_signal(self) -> None:
        """Send the next signal of the sequence."""
        self.deadline = None
        for number, name, seconds in self.steps or ():
            try:
                os.kill(self.pid, number)
                os.kill(self.pid, CONT)  # a stopped process reacts only to SIGKILL
            except ProcessLookupError:
                return
            if number == CONT and "data_dir" in self.spec:
                unblock(self.spec["data_dir"])
            self.used.append(name)
            self.deadline = time.monotonic() + seconds
            return

    def stop_as_requested(self) -> None:
        """Stop the postmaster with the signal sequence selected in the request."""
        self.stop("keep" if self.spec["keep"] else "discard")

    def close_descriptors(self) -> None:
        """Close the lease file and the log, which must stay open until all files are removed."""
        os.close(self.lease)
        os.close(self.log)

    def rename_for_removal(self) -> list[str]:
        """Rename the paths to be removed, so that they disappear now; return the new names."""
        moved = []
        for path in self.spec["remove"]:
            try:
                os.rename(path, path + REMOVING)
                moved.append(path + REMOVING)
            except OSError:
                moved.append(path)
        return moved
