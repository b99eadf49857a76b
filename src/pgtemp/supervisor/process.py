"""The warden's process: starts postmasters and makes sure nothing outlives its owner.

Run by `supervision.py` as a small interpreter of its own, one per owner. Single-threaded, because a
postmaster's death signal (PR_SET_PDEATHSIG) hangs on the thread that forked it. The owner holds
one control socket and, for each server, one channel; when a channel closes, its server is stopped
and removed, so an owner that vanishes in whatever way takes its servers along.

It imports nothing that imports slowly: `socket`, `signal` and `typing` alone would double the time
to the first server (12 of 25 ms), so the C halves are used, and marshal in place of json.
"""

from __future__ import annotations

import _socket
import os
import select
import sys
import time

from pgtemp.host.removal import removal
from pgtemp.supervisor.children import INT, QUIT, Server
from pgtemp.supervisor.crash import clear_crashed, end_group, libc
from pgtemp.supervisor.leftovers import DATA, sweep
from pgtemp.supervisor.protocol import decode

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Iterator
else:
    import _signal

PR_SET_CHILD_SUBREAPER = 36
_LONGEST_WAIT = 3_600_000.0  # milliseconds; poll takes no more than 24 days
FDS = 3  # what comes with a request: channel, lease, log


class SupervisorProcess:
    """The loop: requests, deaths, deadlines, and removals in the time that is left."""

    def __init__(self, control: int, owner: int) -> None:
        os.set_inheritable(control, False)  # it came through exec, and no server may have it
        self.control: _socket.socket | None = _socket.socket(fileno=control)
        self.poll = select.poll()
        self.poll.register(control, select.POLLIN)
        self.owner = -1
        try:
            self.owner = os.pidfd_open(owner)
            self.poll.register(self.owner, select.POLLIN)
        except (AttributeError, OSError):
            pass  # no pidfd here: the end of the control socket has to do
        self.wake, sink = os.pipe()
        os.set_blocking(sink, False)
        os.set_blocking(self.wake, False)
        self.poll.register(self.wake, select.POLLIN)
        _signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
        # Whoever started the owner may have blocked signals, and a mask outlives exec.
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        # Handlers that do nothing, not SIG_IGN: exec would hand the latter on to PostgreSQL.
        for number in (_signal.SIGCHLD, INT, QUIT, _signal.SIGTERM, _signal.SIGHUP):
            _signal.signal(number, lambda *_: None)
        if sys.platform == "linux":
            libc("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.servers: dict[int, Server] = {}  # by the channel's descriptor
        self.ending: list[Server] = []  # those whose channel is closed
        self.chores: list[Iterator[None]] = []

    def run(self) -> None:
        while self.control is not None or self.servers or self.ending or self.chores:
            for fd, _ in self.poll.poll(self._patience()):
                if fd == self.wake:
                    self._reap()
                elif fd == self.owner:
                    self._owner_gone()
                elif self.control is not None and fd == self.control.fileno():
                    if not self._accept():
                        self._owner_gone()
                elif fd in self.servers:
                    self._listen(self.servers[fd])
            self._expire()
            self._do_chores()

    def _patience(self) -> int | None:
        """Milliseconds until something is due."""
        if self.chores:
            return 0
        deadlines = [s.deadline for s in self._all() if s.deadline is not None]
        if not deadlines:
            return None
        milliseconds = (min(deadlines) - time.monotonic()) * 1000
        return int(max(0.0, min(milliseconds, _LONGEST_WAIT))) + 1

    def _all(self) -> list[Server]:
        return [*self.servers.values(), *self.ending]

    def _accept(self) -> bool:
        """A byte on the control socket brings a server's descriptors; its end is the end."""
        assert self.control is not None
        flags = getattr(_socket, "MSG_CMSG_CLOEXEC", 0) | _socket.MSG_DONTWAIT
        size = _socket.CMSG_SPACE(FDS * 4)
        try:
            data, ancillary, _, _ = self.control.recvmsg(1, size, flags)
        except BlockingIOError:
            return False
        except OSError:
            data, ancillary = b"", []
        fds = [
            int.from_bytes(payload[i : i + 4], sys.byteorder)
            for _, _, payload in ancillary
            for i in range(0, len(payload), 4)
        ]
        if data and len(fds) == FDS:
            for fd in fds:
                os.set_inheritable(fd, False)
            self.servers[fds[0]] = Server(_socket.socket(fileno=fds[0]), fds[1], fds[2])
            self.poll.register(fds[0], select.POLLIN)
        return bool(data)

    def _owner_gone(self) -> None:
        if self.owner >= 0:
            self.poll.unregister(self.owner)
            self.owner = -1
        if self.control is not None:
            while self._accept():
                pass  # what it sent with its last breath counts too
            self.poll.unregister(self.control.fileno())
            self.control = None
        for server in list(self.servers.values()):
            self._listen(server)
            if server.channel is not None:  # a forked child holds the other end
                self._disown(server)

    def _listen(self, server: Server) -> None:
        assert server.channel is not None
        try:
            data = server.channel.recv(65536, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        server.buffer += data
        while (message := decode(server.buffer)) is not None:
            if "argv" in message or "shelf" in message:
                server.spec.update(message)
                server.start()
                self.chores += [sweep(base) for base in message["sweep"]]
            elif "stop" not in message:  # what is to be removed, before there is a server in it
                server.spec.update(message)
            else:
                self._stop(server, message["stop"], message["remove"])
        if not data:
            self._disown(server)

    def _stop(self, server: Server, ladder: str, remove: list[str] | None) -> None:
        server.halting = remove is None
        if remove is not None:
            server.spec.update(remove=remove)
        if server.pid:
            server.stop(ladder)
        else:
            self._stopped(server)

    def _stopped(self, server: Server) -> None:
        if server.halting and server.channel is not None:
            server.tell(stopped=True, used=server.used)
        else:
            self._remove(server)

    def _disown(self, server: Server) -> None:
        """Nobody holds this server any more."""
        assert server.channel is not None
        fd = server.channel.fileno()
        self.poll.unregister(fd)
        del self.servers[fd]
        server.channel.close()
        server.channel = None
        if server.pid:
            self.ending.append(server)
            server.end()
        elif server.spec:
            self._remove(server)
        else:  # it never came to a request
            server.let_go()

    def _remove(self, server: Server) -> None:
        if server.removed:
            server.tell(stopped=True, used=server.used)
            return
        server.removed = True
        leader = server.spec.get("guard", 0)
        # What a program still works in keeps its name.
        paths = server.spec["remove"] if leader else server.set_aside()
        if not leader and not paths:
            server.let_go()  # before whoever waits for it is told
        server.tell(stopped=True, used=server.used)

        def chore() -> Iterator[None]:
            try:
                if leader:
                    yield from end_group(leader, server.spec["gently"])
                    for path in paths:
                        clear_crashed(os.path.join(path, DATA))
                for path in paths:
                    yield from removal(path)
            finally:
                server.let_go()

        if leader or paths:
            self.chores.append(chore())

    def _reap(self) -> None:
        try:
            os.read(self.wake, 4096)
        except BlockingIOError:
            pass
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for server in self._all():
                if server.pid == pid:
                    self._died(server, os.waitstatus_to_exitcode(status))

    def _died(self, server: Server, code: int) -> None:
        pid, server.pid, server.deadline = server.pid, 0, None
        server.tell(exit=code)  # first: whoever has lost a connection wants to know why
        if code < 0 and "data_dir" in server.spec:
            clear_crashed(server.spec["data_dir"], pid)
        if server in self.ending:
            self.ending.remove(server)
            self._remove(server)
        elif server.steps is not None:
            self._stopped(server)

    def _expire(self) -> None:
        now = time.monotonic()
        for server in self._all():
            if server.deadline is not None and server.deadline <= now:
                if server.steps is None:
                    server.end()
                else:
                    server.climb()

    def _do_chores(self) -> None:
        # In small portions: a request that comes meanwhile waits for a few unlinks at most.
        # In turn, since a program of a server's user may go on filling what is being removed.
        for _ in range(32):
            if self.chores:
                try:
                    next(self.chores[0])
                    self.chores.append(self.chores[0])
                except Exception:  # its end, or whatever it met: all servers depend on us
                    pass
                del self.chores[0]


def main() -> None:
    """Run the loop: the control socket is standard input, the argument is the owner's pid."""
    SupervisorProcess(0, int(sys.argv[1])).run()
