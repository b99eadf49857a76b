"""One running postmaster on a private copy of an image.

The data directory is copied from the image, and the supervisor starts the postmaster. It is ready
when PostgreSQL records this in postmaster.pid. The copying continues while the postmaster starts
(see images/image.py). At the end the whole run directory is removed. This module does not depend on
roles or databases.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pgtemp.errors import ClusterError, WardenError
from pgtemp.host import disk_space, ports
from pgtemp.host.background import in_background
from pgtemp.host.file_copy import ChangedError
from pgtemp.host.openat import Closing
from pgtemp.host.tree import Tree
from pgtemp.images.source import Copyable
from pgtemp.server import rundir, status
from pgtemp.server.spec import SOCKET_PORT, ServerSpec
from pgtemp.supervisor import supervision
from pgtemp.supervisor.channel import Channel
from pgtemp.supervisor.crash import clear_crashed, unblock

_START_SECONDS = 60.0
# Crash recovery and a shutdown checkpoint of large persisted data may take minutes.
_RECOVERY_SECONDS = 600.0
_STARTING_POLL = 0.001
_NO_SOCKETS = "could not create any TCP/IP sockets"
_TRIES = 10


@dataclass(slots=True)
class Postmaster:
    """One postmaster. `start` and `stop` may be called from any thread, once each.

    Attributes:
        spec: its parameters.
        existing: a run directory with persisted data, on which the server is started in place.
        verifier: the superuser's password verifier, it is stored if the source allows that without
            SQL; `has_password` is true if it was stored.
        let_in: when it last admitted a client, by `time.monotonic()`, if that was recorded.
    """

    spec: ServerSpec
    existing: Path | None = None
    verifier: str | None = None
    has_password: bool = field(init=False, default=False)
    home: rundir.RunDirectory = field(init=False)
    port: int = field(init=False, default=SOCKET_PORT)
    pid: int = field(init=False, default=0)
    let_in: float = field(init=False, default=0.0)
    log_path: Path = field(init=False)
    _channel: Channel | None = field(init=False, default=None)
    _stopping: threading.Lock = field(init=False, default_factory=threading.Lock)

    @property
    def socket_dir(self) -> Path:
        return self.home.socket_dir

    @property
    def data_dir(self) -> Path:
        return self.home.data

    def start(self, meanwhile: Callable[[Postmaster], None] = lambda _: None) -> None:
        """Create the data directory and start the server on it.

        Args:
            meanwhile: called when the server is ready, while the templates are still being copied;
                it may use the database `postgres` and no other.

        Raises:
            OptionError: the requested port is in use, or a directory cannot be used.
            ClusterError: the server did not start; the details are the end of its log.
            ChangedError: the image is damaged.
        """
        self.spec.check_port()
        for attempt in range(_TRIES):
            try:
                self._start(meanwhile)
                return
            except _PortLostError:
                if attempt == _TRIES - 1:
                    raise
            except WardenError:  # the supervisor was killed; the next attempt starts another
                if attempt > 0:
                    raise
            except ChangedError as damage:
                if attempt > 0:
                    raise ClusterError(f"the rebuilt image is also damaged: {damage}") from damage
                self.spec.source.repair(damage)

    def _start(self, meanwhile: Callable[[Postmaster], None]) -> None:
        spec, persisted = self.spec, self.existing is not None
        supervisor = supervision.current()
        if self.existing is None:
            self.home = rundir.make(spec.prefix, spec.owner, keep=spec.keep)
        else:
            self.home = rundir.reopen(self.existing, spec.owner)
        self.log_path = spec.log_path or self.home.log
        try:
            # Before anything is copied, so that the supervisor cleans up after a killed owner. New
            # data is persisted only once it is complete.
            with Closing(spec.open_log(self.home)) as log:
                self._channel = supervisor.hold(
                    self.home.leftovers(keep=persisted),
                    keep=persisted,
                    lease=self.home.lease,
                    log=log,
                )
            if persisted:
                self._request_start(self._channel)
                self._await_ready(self._channel)
            else:
                with rundir.new_data(self.home, spec.owner) as data:
                    self._start_on(data, self._channel, meanwhile)
            if spec.keep:
                self._channel.set_cleanup(self.home.leftovers(keep=True), keep=True)
        except BaseException:
            self._undo(keep=persisted)
            raise

    def _start_on(
        self, data: Tree, channel: Channel, meanwhile: Callable[[Postmaster], None]
    ) -> None:
        """Fill a new data directory while the server starts on it."""
        source = self.spec.source.resolve()
        self._write(self._begin, source, data)
        self._request_start(channel)
        self._write(source.first, data)
        with in_background(lambda: self._write(source.rest, data)):
            self._await_ready(channel)
            self._write(source.warm, data)
            meanwhile(self)

    def _begin(self, source: Copyable, data: Tree) -> None:
        source.begin(data)
        self.spec.write_config(data)
        if self.verifier is not None:
            self.has_password = source.set_password(data, self.verifier)
        data.hand_over("")

    def _write(self, part: Callable[..., None], *arguments: object) -> None:
        with disk_space.writing(self.home.path):
            part(*arguments)

    def _request_start(self, channel: Channel) -> None:
        self.port = self.spec.choose_port()
        self.home.link_socket(self.port)
        channel.start(self.spec.request(self.home, self.port))

    def _await_ready(self, channel: Channel) -> None:
        """Wait until the server accepts connections.

        Reading its status file every millisecond costs a hundredth of what a loop of connection
        attempts costs, and does not depend on the logging settings.
        """
        self.pid = channel.await_started()
        seconds = _START_SECONDS if self.existing is None else _RECOVERY_SECONDS
        deadline = time.monotonic() + seconds
        while channel.wait(_STARTING_POLL) is None:
            if self._status() == "ready":
                self._check_listening()
                self.home.protect_socket()
                return
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"PostgreSQL was not ready within {seconds:g} s", details=self.log_tail()
                )
        if self.spec.port is None and any(_NO_SOCKETS in line for line in self.log_tail()):
            raise _PortLostError(f"another process took port {self.port}")
        raise self._exit_error(channel)

    def _check_listening(self) -> None:
        """Check that the server listens on each of several addresses.

        It starts if it listens on one of them. A client that tries the addresses in turn would then
        connect to another user's process. With a single address, PostgreSQL itself exits.
        """
        for address in self.spec.addresses if len(self.spec.addresses) > 1 else ():
            if not ports.listens(address, self.port, self.pid):
                raise _PortLostError(f"another process took port {self.port} on {address}")

    def _undo(self, *, keep: bool) -> None:
        """Remove what a failed start has created; data that was persisted before remains."""
        channel, self._channel = self._channel, None
        if channel is not None:
            self._stop(channel, keep=keep)
        else:
            rundir.discard(self.home.leftovers(keep=keep))
            self.home.release()

    def stop(self) -> list[str]:
        """Stop the server, remove what is not persisted, and return the signals that were needed.

        Further calls do nothing.
        """
        with self._stopping:
            channel, self._channel = self._channel, None
            return [] if channel is None else self._stop(channel, keep=self.spec.keep)

    def _stop(self, channel: Channel, *, keep: bool) -> list[str]:
        leftovers = self.home.leftovers(keep=keep)
        try:
            return channel.stop(keep=keep, remove=leftovers)
        except WardenError:
            # PostgreSQL was killed with its supervisor, so this process removes the files.
            clear_crashed(str(self.data_dir))
            rundir.discard(leftovers)
            return ["SIGQUIT"]
        finally:
            self.home.release()

    def halt(self) -> None:
        """Shut the server down cleanly; its directory remains until `stop`, or the owner's exit.

        Raises WardenError if the server could not be stopped.
        """
        if self._channel is not None:
            self._channel.halt()

    def abandon(self) -> None:
        """Let the supervisor stop the server, without waiting for it."""
        if not self._stopping.acquire(blocking=False):
            return  # another thread is stopping it
        try:
            channel, self._channel = self._channel, None
        finally:
            self._stopping.release()
        if channel is not None:
            channel.abandon()
            self.home.release()

    def unblock(self) -> None:
        """Continue the server's stopped processes; kill programs for which its backends wait."""
        unblock(str(self.data_dir))

    def fileno(self) -> int:
        """A descriptor that becomes readable when `check` has a new state to report."""
        return self._channel.fileno() if self._channel is not None else -1

    def check(self) -> None:
        """Raise an error if the server has exited, or no longer accepts connections.

        Raises ClusterError if the server has exited (the details are the end of its log), or is
        shutting down, and WardenError if the supervisor was killed, and the server with it.
        """
        channel = self._channel
        if channel is None:
            return
        if channel.wait(0) is not None:
            raise self._exit_error(channel)
        if self._status() == "stopping":  # a smart shutdown lasts as long as a client is connected
            raise ClusterError(
                f"PostgreSQL (pid {self.pid}) is shutting down and accepts no connections",
                remedy="start a new server",
            )

    def log_tail(self) -> list[str]:
        """The last lines of the server's log."""
        return status.log_tail(self.log_path)

    def _status(self) -> str:
        return status.status(self.data_dir, self.pid)

    def _exit_error(self, channel: Channel) -> ClusterError:
        return status.exit_error(self.pid, channel.exit_status, self.home.path, self.log_tail())


class _PortLostError(ClusterError):
    """Another process took the chosen port before the server could bind it."""
