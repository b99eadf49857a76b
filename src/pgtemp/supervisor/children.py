"""What the warden's process holds for its owner: a postmaster in its home, or the shelf of one.

Part of that process, so it imports nothing that imports slowly.
"""

from __future__ import annotations

import _socket
import os
import sys
import time

from pgtemp.host.removal import ASIDE
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
# (signal, its name, seconds to wait for the postmaster after it). Data that is thrown away needs
# no shutdown checkpoint, and no more than the moment in which a postmaster removes its shared
# memory. Data that is kept gets the time a checkpoint of a large one may take. A fast shutdown
# waits for all backends, so SIGCONT goes to each process of the server if some do not end.
LADDERS = {
    "discard": ((QUIT, "SIGQUIT", 2.0), (KILL, "SIGKILL", 5.0)),
    "keep": (
        (INT, "SIGINT", 1.0), (CONT, "SIGCONT", 59.0),
        (QUIT, "SIGQUIT", 5.0), (KILL, "SIGKILL", 5.0),
    ),
}  # fmt: skip
_PR_SET_PDEATHSIG = 1
_NICE = 5  # of what looks after a shelf: whoever waits for a database comes first
_MOST_FDS = 1 << 20


class Server:
    """One postmaster, from the request that asks for it to the removal of its directory.

    Or one process that looks after a shelf, in which case `log` is the socket that leads to it.
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
        self.halting = False  # the directory outlives the postmaster, until the channel closes

    def tell(self, **message: Any) -> None:
        if self.channel is not None:
            try:
                self.channel.send(encode(message))
            except OSError:
                pass  # the owner is gone; the end of the channel says so next

    def start(self) -> None:
        warden = os.getpid()
        try:
            self.pid = os.fork()
        except OSError as error:
            self.tell(error=str(error))
            return
        else:
            if self.pid == 0:
                if "shelf" in self.spec:
                    self._become_shelf(warden)
                self._become_postmaster(warden)
            if "shelf" in self.spec:  # the socket's other end is to close with the child
                os.dup2(self.lease, self.log, inheritable=False)
        if self.spec["ttl"] is not None:
            self.deadline = time.monotonic() + self.spec["ttl"]
        self.tell(pid=self.pid)

    def _become_postmaster(self, warden: int) -> None:
        """In the child: drop privileges, ask for the death signal, exec. Never returns."""
        spec = self.spec
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(self.log, 1)
            os.dup2(self.log, 2)
            for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
                _signal.signal(number, _signal.SIG_DFL)  # Python ignores these; exec keeps that
            self._become_user(QUIT)
            if os.getppid() == warden:
                os.execve(spec["argv"][0], spec["argv"], spec["env"])
        except BaseException as error:
            os.write(2, f"FATAL: {spec['argv'][0]} could not be run: {error}\n".encode())
        os._exit(127)

    def _become_shelf(self, warden: int) -> None:
        """In the child: drop privileges and do the shelf's work. Never returns.

        Without exec: the server's user need not be able to run this interpreter.
        """
        try:
            os.dup2(self.log, 0)
            os.closerange(3, _MOST_FDS)
            _signal.set_wakeup_fd(-1)
            _signal.signal(QUIT, lambda *_: os._exit(0))
            self._become_user(KILL)
            os.nice(_NICE)
            if os.getppid() == warden:
                recycle_files.serve(_socket.socket(fileno=0), self.spec["shelf"])
        finally:
            os._exit(0)

    def _become_user(self, death: int) -> None:
        """In a child: be who the server is to be, and go when the warden goes."""
        os.umask(0o077)
        if self.spec["uid"] is not None:
            os.setgroups([])
            os.setgid(self.spec["gid"])
            os.setuid(self.spec["uid"])
        if sys.platform == "linux":
            libc("prctl", _PR_SET_PDEATHSIG, death, 0, 0, 0)  # after setuid, which clears it

    def stop(self, ladder: str) -> None:
        if self.steps is None:
            self.steps = iter(LADDERS[ladder])
            self.climb()

    def climb(self) -> None:
        """Send the next signal of the ladder."""
        self.deadline = None
        for number, name, seconds in self.steps or ():
            try:
                os.kill(self.pid, number)
                os.kill(self.pid, CONT)  # a stopped process obeys SIGKILL only
            except ProcessLookupError:
                return
            if number == CONT and "data_dir" in self.spec:
                unblock(self.spec["data_dir"])
            self.used.append(name)
            self.deadline = time.monotonic() + seconds
            return

    def end(self) -> None:
        """End as the request said this server's end should be."""
        self.stop("keep" if self.spec["keep"] else "discard")

    def let_go(self) -> None:
        """Close what was held as long as there was something to remove."""
        os.close(self.lease)
        os.close(self.log)

    def set_aside(self) -> list[str]:
        """Rename what is to be removed, so that it is gone for everyone at once."""
        aside = []
        for path in self.spec["remove"]:
            try:
                os.rename(path, path + ASIDE)
                aside.append(path + ASIDE)
            except OSError:
                aside.append(path)
        return aside
