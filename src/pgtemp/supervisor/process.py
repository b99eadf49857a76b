"""The supervisor process: starts postmasters, and ensures that none outlives its owner.

`supervision.py` runs it as a separate, minimal interpreter, one per owner. It is single-threaded,
because a postmaster gets its death signal (PR_SET_PDEATHSIG) when the thread that forked it exits.
The owner holds one control socket, and one channel for each server. When a channel closes, the
supervisor stops its server and removes the run directory. An owner's servers are therefore removed,
however the owner exits.

It imports no module that is slow to import: `socket`, `signal` and `typing` alone would double the
time to the first server (12 of 25 ms), so it uses their C extension modules, and marshal instead of
json.
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
_LONGEST_WAIT = 3_600_000.0  # milliseconds; poll accepts at most 24 days
FDS = 3  # descriptors sent with a request: channel, lease, log


class SupervisorProcess:
    """The event loop: requests, exits of child processes, deadlines, and removals in between."""

    def __init__(self, control: int, owner: int) -> None:
        os.set_inheritable(control, False)  # inherited through exec; servers must not inherit it
        self.control: _socket.socket | None = _socket.socket(fileno=control)
        self.poll = select.poll()
        self.poll.register(control, select.POLLIN)
        self.owner = -1
        try:
            self.owner = os.pidfd_open(owner)
            self.poll.register(self.owner, select.POLLIN)
        except (AttributeError, OSError):
            pass  # no pidfd on this system: rely on the end of the control socket
        self.wake, sink = os.pipe()
        os.set_blocking(sink, False)
        os.set_blocking(self.wake, False)
        self.poll.register(self.wake, select.POLLIN)
        _signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
        # The owner's parent may have blocked signals, and exec preserves the signal mask.
        _signal.pthread_sigmask(_signal.SIG_SETMASK, ())
        # Handlers that do nothing, not SIG_IGN: PostgreSQL would inherit SIG_IGN through exec.
        for number in (_signal.SIGCHLD, INT, QUIT, _signal.SIGTERM, _signal.SIGHUP):
            _signal.signal(number, lambda *_: None)
        if sys.platform == "linux":
            libc("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.servers: dict[int, Server] = {}  # by the channel's descriptor
        self.ending: list[Server] = []  # servers whose channel is closed
        self.tasks: list[Iterator[None]] = []

    def run(self) -> None:
        while self.control is not None or self.servers or self.ending or self.tasks:
            for fd, _ in self.poll.poll(self._timeout()):
                if fd == self.wake:
                    self._reap()
                elif fd == self.owner:
                    self._owner_exited()
                elif self.control is not None and fd == self.control.fileno():
                    if not self._accept():
                        self._owner_exited()
                elif fd in self.servers:
                    self._receive(self.servers[fd])
            self._check_deadlines()
            self._run_tasks()

    def _timeout(self) -> int | None:
        """Milliseconds until the next deadline; 0 if tasks are waiting; None if nothing is."""
        if self.tasks:
            return 0
        deadlines = [s.deadline for s in self._all() if s.deadline is not None]
        if not deadlines:
            return None
        milliseconds = (min(deadlines) - time.monotonic()) * 1000
        return int(max(0.0, min(milliseconds, _LONGEST_WAIT))) + 1

    def _all(self) -> list[Server]:
        return [*self.servers.values(), *self.ending]

    def _accept(self) -> bool:
        """Receive one server's descriptors; False if none has arrived or the socket is closed."""
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

    def _owner_exited(self) -> None:
        if self.owner >= 0:
            self.poll.unregister(self.owner)
            self.owner = -1
        if self.control is not None:
            while self._accept():
                pass  # requests that it sent before it exited are still valid
            self.poll.unregister(self.control.fileno())
            self.control = None
        for server in list(self.servers.values()):
            self._receive(server)
            if server.channel is not None:  # a forked child holds the other end
                self._close_channel(server)

    def _receive(self, server: Server) -> None:
        assert server.channel is not None
        try:
            data = server.channel.recv(65536, _socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        server.buffer += data
        while (message := decode(server.buffer)) is not None:
            if "argv" in message or "recycled" in message:
                server.spec.update(message)
                server.start()
                self.tasks += [sweep(base) for base in message["sweep"]]
            elif "stop" not in message:  # set_cleanup or guard; may arrive before the start request
                server.spec.update(message)
            else:
                self._stop(server, message["stop"], message["remove"])
        if not data:
            self._close_channel(server)

    def _stop(self, server: Server, sequence: str, remove: list[str] | None) -> None:
        server.halting = remove is None
        if remove is not None:
            server.spec.update(remove=remove)
        if server.pid:
            server.stop(sequence)
        else:
            self._stopped(server)

    def _stopped(self, server: Server) -> None:
        if server.halting and server.channel is not None:
            server.send(stopped=True, used=server.used)
        else:
            self._remove(server)

    def _close_channel(self, server: Server) -> None:
        """The owner no longer holds this server: stop it, or remove its files."""
        assert server.channel is not None
        fd = server.channel.fileno()
        self.poll.unregister(fd)
        del self.servers[fd]
        server.channel.close()
        server.channel = None
        if server.pid:
            self.ending.append(server)
            server.stop_as_requested()
        elif server.spec:
            self._remove(server)
        else:  # it never received a request
            server.close_descriptors()

    def _remove(self, server: Server) -> None:
        if server.removed:
            server.send(stopped=True, used=server.used)
            return
        server.removed = True
        leader = server.spec.get("guard", 0)
        # Directories in which a guarded program still works are not renamed.
        paths = server.spec["remove"] if leader else server.rename_for_removal()
        if not leader and not paths:
            server.close_descriptors()  # before the owner is notified, because it waits for this
        server.send(stopped=True, used=server.used)

        def removals() -> Iterator[None]:
            try:
                if leader:
                    yield from end_group(leader, server.spec["gently"])
                    for path in paths:
                        clear_crashed(os.path.join(path, DATA))
                for path in paths:
                    yield from removal(path)
            finally:
                server.close_descriptors()

        if leader or paths:
            self.tasks.append(removals())

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
                    self._server_exited(server, os.waitstatus_to_exitcode(status))

    def _server_exited(self, server: Server, code: int) -> None:
        pid, server.pid, server.deadline = server.pid, 0, None
        # Do this first, because a client that lost its connection waits for the reason.
        server.send(exit=code)
        if code < 0 and "data_dir" in server.spec:
            clear_crashed(server.spec["data_dir"], pid)
        if server in self.ending:
            self.ending.remove(server)
            self._remove(server)
        elif server.steps is not None:
            self._stopped(server)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for server in self._all():
            if server.deadline is not None and server.deadline <= now:
                if server.steps is None:
                    server.stop_as_requested()
                else:
                    server.send_next_signal()

    def _run_tasks(self) -> None:
        # In small portions, so that a new request waits for at most a few unlinks. In turn, because
        # a program of a server user may keep adding files to a directory while it is being removed.
        for _ in range(32):
            if self.tasks:
                try:
                    next(self.tasks[0])
                    self.tasks.append(self.tasks[0])
                except Exception:  # finished, or failed: all servers depend on this process
                    pass
                del self.tasks[0]


def main() -> None:
    """Run the loop. Standard input is the control socket; the argument is the owner's pid."""
    SupervisorProcess(0, int(sys.argv[1])).run()
