"""One running postmaster on a private copy of an image.

The data directory is copied from the image, and the supervisor starts the postmaster. It is ready
when PostgreSQL records that in postmaster.pid. The copying continues while the postmaster starts
(see images/image.py). At the end the whole run directory is removed. This module knows nothing of
roles or databases.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pgtemp.errors import ClusterError, OptionError, WardenError
from pgtemp.host import disk_space, paths, ports, processes, reach
from pgtemp.host.file_copy import ChangedError
from pgtemp.host.identity import Identity
from pgtemp.host.tree import Tree
from pgtemp.images.image import CONF, Copyable, Source
from pgtemp.programs.installation import Installation
from pgtemp.server import rundir, status
from pgtemp.supervisor import supervision
from pgtemp.supervisor.crash import clear_crashed, unblock

START_SECONDS = 60.0
# Crash recovery and a shutdown checkpoint of large persisted data may take minutes.
RECOVERY_SECONDS = 600.0
_STARTING_POLL = 0.001
_NO_SOCKETS = "could not create any TCP/IP sockets"
_TRIES = 10
_CONF_BYTES = 16 << 20
SOCKET_PORT = 5432  # the port in the socket's file name if the server does not listen on TCP


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """The parameters of a server; several servers may share one specification.

    Attributes:
        source: the source from which the data directory is copied.
        conf: a function that makes the text of postgresql.conf from that of the source.
        hba: the text of pg_hba.conf.
        addresses: loopback addresses to listen on; if empty, only the unix socket is used.
        port: the TCP port; None chooses a free one.
        prefix: the directory in which the run directory is created; None chooses one.
        keep: whether the data is persisted.
        ttl: seconds after which the supervisor stops the server in any case.
        log_path: the file for the server log; None is one in the run directory.
    """

    installation: Installation
    owner: Identity
    source: Source
    conf: Callable[[str], str]
    hba: str
    addresses: Sequence[str] = ()
    port: int | None = None
    prefix: str | os.PathLike[str] | None = None
    keep: bool = False
    ttl: float | None = None
    log_path: Path | None = None


@dataclass(slots=True)
class Postmaster:
    """One postmaster. `start` and `stop` may be called from any thread, once each.

    Attributes:
        spec: its parameters.
        existing: a run directory with persisted data, on which to start in place.
        verifier: the superuser's password verifier, to be stored if the source allows that without
            SQL; `has_password` is true if it was stored.
        let_in: when it last admitted a client, by `time.monotonic()`, as far as that is recorded.
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
    _process: supervision.Process | None = field(init=False, default=None)
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
        self._check_port()
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
                    raise ClusterError(f"the rebuilt image is damaged, too: {damage}") from damage
                self.spec.source.repair(damage)

    def _start(self, meanwhile: Callable[[Postmaster], None]) -> None:
        spec = self.spec
        supervisor = supervision.current()
        if self.existing is None:
            self.home = rundir.make(spec.prefix, spec.owner, keep=spec.keep)
        else:
            self.home = rundir.reopen(self.existing, spec.owner)
        self.log_path = spec.log_path or self.home.log
        try:
            # Before anything is copied, so that the supervisor cleans up after a killed owner.
            self._hold(supervisor)
            assert self._process is not None
            if self.existing is None:
                with rundir.new_data(self.home, spec.owner) as data:
                    self._start_on(spec.source.resolve(), data, meanwhile)
            else:
                self._start_postmaster()
                self._await_ready()
            if spec.keep:
                self._process.set_cleanup(self.home.leftovers(keep=True), keep=True)
        except BaseException:
            self._undo()
            raise

    def _start_on(
        self, source: Copyable, data: Tree, meanwhile: Callable[[Postmaster], None]
    ) -> None:
        """Fill a data directory while the server starts on it."""
        self._begin(source, data)
        self._start_postmaster()
        self._copy(source.first, data)
        with in_background(lambda: self._copy(source.rest, data)):
            self._await_ready()
            self._copy(source.warm, data)
            meanwhile(self)

    def _start_postmaster(self) -> None:
        assert self._process is not None
        self._choose_port()
        self.home.link_socket(self.port)
        self._process.start(self._request())

    def stop(self) -> list[str]:
        """Stop the server, remove what is not persisted, and return the signals that were needed.

        Further calls do nothing.
        """
        with self._stopping:
            process, self._process = self._process, None
            if process is None:
                return []
            keep = self.spec.keep
            return self._stop(process, keep=keep)

    def _stop(self, process: supervision.Process, *, keep: bool) -> list[str]:
        leftovers = self.home.leftovers(keep=keep)
        try:
            return process.stop(keep=keep, remove=leftovers)
        except WardenError:
            # PostgreSQL was killed with its supervisor, so this process removes the files.
            clear_crashed(str(self.data_dir))
            rundir.discard(leftovers)
            return ["SIGQUIT"]
        finally:
            self.home.release()

    def halt(self) -> None:
        """Shut the server down cleanly; its directory remains until `stop`, or the owner's exit.

        Raises:
            WardenError: the server could not be stopped.
        """
        if self._process is not None:
            self._process.halt()

    def abandon(self) -> None:
        """Let the supervisor stop the server, without waiting for it."""
        if not self._stopping.acquire(blocking=False):
            return  # another thread is stopping it
        try:
            process, self._process = self._process, None
        finally:
            self._stopping.release()
        if process is not None:
            process.abandon()
            self.home.release()

    def unblock(self) -> None:
        """Continue the server's stopped processes; kill programs for which its backends wait."""
        unblock(str(self.data_dir))

    def fileno(self) -> int:
        """A descriptor that becomes readable when `check` has a new state to report."""
        return self._process.fileno() if self._process is not None else -1

    def check(self) -> None:
        """Raise if the server has exited, or no longer accepts connections.

        Raises:
            ClusterError: the server has exited (the details are the end of its log), or is shutting
                down.
            WardenError: the supervisor was killed, and the server with it.
        """
        process = self._process
        if process is None:
            return
        if process.wait(0) is not None:
            raise self._exit_error()
        if self._status() == "stopping":  # a smart shutdown lasts as long as a client is connected
            raise ClusterError(
                f"PostgreSQL (pid {self.pid}) is shutting down and accepts no connections",
                remedy="start a new server",
            )

    def log_tail(self) -> list[str]:
        """The last lines of the server's log."""
        return status.log_tail(self.log_path)

    def _begin(self, source: Copyable, data: Tree) -> None:
        spec = self.spec
        self._copy(source.begin, data)
        try:
            try:
                conf = data.read(CONF, _CONF_BYTES).decode(errors="surrogateescape")
            except FileNotFoundError:
                conf = ""
            data.write(CONF, spec.conf(conf).encode(errors="surrogateescape"))
            data.write("pg_hba.conf", spec.hba.encode(errors="surrogateescape"))
            if self.verifier is not None:
                self.has_password = source.set_password(data, self.verifier)
            data.hand_over("")
        except OSError as error:
            raise disk_space.cannot_write(self.home.path, error) from error

    def _copy(self, part: Callable[[Tree], None], data: Tree) -> None:
        try:
            part(data)
        except OSError as error:
            raise disk_space.cannot_write(self.home.path, error) from error

    def _hold(self, supervisor: supervision.Supervisor) -> None:
        keep = self.existing is not None  # new data is persisted only once it is complete
        log = self._open_log()
        try:
            self._process = supervisor.hold(
                self.home.leftovers(keep=keep), keep=keep, lease=self.home.lease, log=log
            )
        finally:
            os.close(log)

    def _request(self) -> supervision.Request:
        spec = self.spec
        settings = {
            "listen_addresses": ",".join(spec.addresses),
            "port": str(self.port),
            "unix_socket_permissions": "0700",
            "unix_socket_directories": str(self.socket_dir),
            "hba_file": str(self.data_dir / "pg_hba.conf"),
        }
        # On the command line, because ALTER SYSTEM in a copied data directory overrides any file.
        argv = [str(spec.installation.program("postgres")), "-D", str(self.data_dir)]
        argv += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return supervision.Request(
            argv=argv,
            env=processes.clean_environment(),
            uid=spec.owner.uid if spec.owner.switch else None,
            gid=spec.owner.gid if spec.owner.switch else None,
            data_dir=str(self.data_dir),
            ttl=spec.ttl,
            sweep=[str(base) for base in {*paths.sweep_bases(), self.home.path.parent}],
        )

    def _open_log(self) -> int:
        try:
            return reach.open_file(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            if self.spec.log_path is None:
                raise disk_space.cannot_write(self.home.path, error) from error
            raise OptionError(
                f"{self.log_path} cannot be written: {error.strerror}",
                remedy="name another file (log_path)",
            ) from error

    def _await_ready(self) -> None:
        """Wait until the server accepts connections.

        Reading its status file every millisecond costs a hundredth of what a loop of connection
        attempts costs, and does not depend on the logging settings.
        """
        assert self._process is not None
        self.pid = self._process.await_started()
        seconds = START_SECONDS if self.existing is None else RECOVERY_SECONDS
        deadline = time.monotonic() + seconds
        while self._process.wait(_STARTING_POLL) is None:
            if self._status() == "ready":
                self.home.keep_socket()
                return
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"PostgreSQL did not get ready within {seconds:g} s", details=self.log_tail()
                )
        if self.spec.port is None and any(_NO_SOCKETS in line for line in self.log_tail()):
            raise _PortLostError(f"another process took port {self.port}")
        raise self._exit_error()

    def _status(self) -> str:
        return status.status(self.data_dir, self.pid)

    def _exit_error(self) -> ClusterError:
        exit_status = self._process.exit_status if self._process is not None else None
        return status.death(self.pid, exit_status, self.home.path, self.log_tail())

    def _check_port(self) -> None:
        port = self.spec.port
        for address in self.spec.addresses if port is not None else ():
            if reason := ports.bind_error(address, port or 0):
                raise ports.taken(address, port or 0, reason)

    def _choose_port(self) -> None:
        spec = self.spec
        if spec.port is not None:
            self.port = spec.port
        elif spec.addresses:
            self.port = ports.free_port(spec.addresses[0])

    def _undo(self) -> None:
        """Remove what a failed start has created; data that was persisted before remains."""
        keep = self.existing is not None
        process, self._process = self._process, None
        if process is not None:
            self._stop(process, keep=keep)
        else:
            rundir.discard(self.home.leftovers(keep=keep))
            self.home.release()


@contextmanager
def in_background(work: Callable[[], None]) -> Iterator[None]:
    """Run `work` in a thread during the block; wait for it afterwards, and raise its exception."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failures:
        raise failures[0]


class _PortLostError(ClusterError):
    """Another process took the chosen port before the server could bind it."""
