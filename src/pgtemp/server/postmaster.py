"""One running postmaster on a private copy of an image.

Born by copying, started by the warden, ready when PostgreSQL itself says so in postmaster.pid, and
taken away as a whole. The copy goes on while the postmaster starts (see image.py). Knows nothing
of roles or databases.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pgtemp.errors import ClusterError, OptionError, WardenError
from pgtemp.host import disk_space, paths, ports, processes, trusted
from pgtemp.host.file_copy import ChangedError
from pgtemp.host.identity import Identity
from pgtemp.host.tree import Tree
from pgtemp.images.image import CONF, Copyable, Source
from pgtemp.programs.installation import Installation
from pgtemp.server import rundir, status
from pgtemp.supervisor import supervision
from pgtemp.supervisor.crash import clear_crashed, unblock

START_SECONDS = 60.0
# Crash recovery and a shutdown checkpoint of large kept data may take minutes.
RECOVERY_SECONDS = 600.0
_STARTING_POLL = 0.001
_NO_SOCKETS = "could not create any TCP/IP sockets"
_TRIES = 10
_CONF_BYTES = 16 << 20
SOCKET_PORT = 5432  # names the socket's file where there is no TCP


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """What clusters are made from; one may serve for many.

    Attributes:
        source: what the data directory is copied from.
        conf: makes the text of postgresql.conf from the source's.
        hba: the text of pg_hba.conf.
        addresses: loopback addresses to listen on; none is the unix socket only.
        port: the TCP port; None chooses a free one.
        prefix: the directory for the home; None chooses one.
        keep: whether the data outlives the server.
        ttl: seconds after which the server is ended whatever happens.
        log_path: the file for the log; None is one in the home.
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
        spec: what it is made from.
        existing: a home that was kept, to start on in place.
        verifier: what to store as the superuser's password, where the source allows that without
            SQL; `has_password` tells whether it did.
        let_in: when it last let a client in, by `time.monotonic()`, as far as that is noted.
    """

    spec: ServerSpec
    existing: Path | None = None
    verifier: str | None = None
    has_password: bool = field(init=False, default=False)
    home: rundir.Home = field(init=False)
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
        """Make the data directory and start the server on it.

        Args:
            meanwhile: called when the server is ready, while the templates are still copied; it
                may use the database `postgres` and nothing else.

        Raises:
            OptionError: a port that was asked for is taken, or a place cannot be used.
            ClusterError: the server did not start; carries the end of its log.
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
            except WardenError:  # killed meanwhile; there is a new one by now
                if attempt > 0:
                    raise
            except ChangedError as damage:
                if attempt > 0:
                    raise ClusterError(f"the image is damaged again: {damage}") from damage
                self.spec.source.repair(damage)

    def _start(self, meanwhile: Callable[[Postmaster], None]) -> None:
        plan = self.spec
        guard = supervision.current()
        if self.existing is None:
            self.home = rundir.make(plan.prefix, plan.owner, keep=plan.keep)
        else:
            self.home = rundir.reopen(self.existing, plan.owner)
        self.log_path = plan.log_path or self.home.log
        try:
            # Before anything is copied: a killed owner leaves nothing half-made behind.
            self._hold(guard)
            assert self._process is not None
            if self.existing is None:
                with rundir.new_data(self.home, plan.owner) as data:
                    self._start_on(plan.source.resolve(), data, meanwhile)
            else:
                self._start_postmaster()
                self._await_ready()
            if plan.keep:
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
        """End the server and remove what is not kept; the signals that it took.

        Does nothing after the first time.
        """
        with self._stopping:
            process, self._process = self._process, None
            if process is None:
                return []
            keep = self.spec.keep
            return self._end(process, keep=keep)

    def _end(self, process: supervision.Process, *, keep: bool) -> list[str]:
        leftovers = self.home.leftovers(keep=keep)
        try:
            return process.stop(keep=keep, remove=leftovers)
        except WardenError:
            # PostgreSQL went with its warden; what is left is ours to take away.
            clear_crashed(str(self.data_dir))
            rundir.discard(leftovers)
            return ["SIGQUIT"]
        finally:
            self.home.release()

    def halt(self) -> None:
        """Shut the server down cleanly; its directory stays until `stop`, or the owner's end.

        Raises:
            WardenError: it could not be ended.
        """
        if self._process is not None:
            self._process.halt()

    def abandon(self) -> None:
        """Let the warden end the server on its own, without waiting for it."""
        if not self._stopping.acquire(blocking=False):
            return  # another thread stops it
        try:
            process, self._process = self._process, None
        finally:
            self._stopping.release()
        if process is not None:
            process.abandon()
            self.home.release()

    def unblock(self) -> None:
        """Continue its stopped processes, and kill programs that its backends wait for."""
        unblock(str(self.data_dir))

    def fileno(self) -> int:
        """A descriptor that can be read when there is news for `check`."""
        return self._process.fileno() if self._process is not None else -1

    def check(self) -> None:
        """Raise if the server has died, or lets nobody in any more.

        Raises:
            ClusterError: it has, or does; carries the end of its log.
            WardenError: it has died with its warden.
        """
        process = self._process
        if process is None:
            return
        if process.wait(0) is not None:
            raise self._died()
        if self._status() == "stopping":  # it may do so for as long as anybody is connected
            raise ClusterError(
                f"PostgreSQL (pid {self.pid}) was told to shut down, and lets nobody in",
                remedy="start a new server",
            )

    def log_tail(self) -> list[str]:
        """The last lines of the server's log."""
        return status.log_tail(self.log_path)

    def _begin(self, source: Copyable, data: Tree) -> None:
        plan = self.spec
        self._copy(source.begin, data)
        try:
            try:
                conf = data.read(CONF, _CONF_BYTES).decode(errors="surrogateescape")
            except FileNotFoundError:
                conf = ""
            data.write(CONF, plan.conf(conf).encode(errors="surrogateescape"))
            data.write("pg_hba.conf", plan.hba.encode(errors="surrogateescape"))
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

    def _hold(self, guard: supervision.Supervisor) -> None:
        keep = self.existing is not None  # what is new is worth keeping once it is whole
        log = self._open_log()
        try:
            self._process = guard.hold(
                self.home.leftovers(keep=keep), keep=keep, lease=self.home.lease, log=log
            )
        finally:
            os.close(log)

    def _request(self) -> supervision.Request:
        plan = self.spec
        settings = {
            "listen_addresses": ",".join(plan.addresses),
            "port": str(self.port),
            "unix_socket_directories": str(self.socket_dir),
            "hba_file": str(self.data_dir / "pg_hba.conf"),
        }
        # On the command line, because ALTER SYSTEM in a copied data directory beats any file.
        argv = [str(plan.installation.program("postgres")), "-D", str(self.data_dir)]
        argv += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return supervision.Request(
            argv=argv,
            env=processes.clean_environment(),
            uid=plan.owner.uid if plan.owner.switch else None,
            gid=plan.owner.gid if plan.owner.switch else None,
            data_dir=str(self.data_dir),
            ttl=plan.ttl,
            sweep=[str(base) for base in {*paths.sweep_bases(), self.home.path.parent}],
        )

    def _open_log(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        if trusted.find_flaw(self.log_path.parent, sticky=False):
            # Another user may have put a link or a pipe there.
            flags |= os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            log = os.open(self.log_path, flags, 0o600)
            if os.geteuid() == 0 != os.fstat(log).st_uid:
                os.close(log)
                raise PermissionError(errno.EPERM, "it belongs to another user")
            return log
        except OSError as error:
            if self.spec.log_path is None:
                raise disk_space.cannot_write(self.home.path, error) from error
            raise OptionError(
                f"{self.log_path} cannot be written: {error.strerror}",
                remedy="name another file (log_path)",
            ) from error

    def _await_ready(self) -> None:
        """Wait until the server accepts connections.

        Reading its state each millisecond costs a hundredth of what a loop of connection attempts
        does, and works whatever the log's settings are.
        """
        assert self._process is not None
        self.pid = self._process.await_started()
        seconds = START_SECONDS if self.existing is None else RECOVERY_SECONDS
        deadline = time.monotonic() + seconds
        while self._process.wait(_STARTING_POLL) is None:
            if self._status() == "ready":
                return
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"PostgreSQL did not get ready within {seconds:g} s", details=self.log_tail()
                )
        if self.spec.port is None and any(_NO_SOCKETS in line for line in self.log_tail()):
            raise _PortLostError(f"port {self.port} was taken by somebody else")
        raise self._died()

    def _status(self) -> str:
        return status.status(self.data_dir, self.pid)

    def _died(self) -> ClusterError:
        exit_status = self._process.exit_status if self._process is not None else None
        return status.death(self.pid, exit_status, self.home.path, self.log_tail())

    def _check_port(self) -> None:
        port = self.spec.port
        for address in self.spec.addresses if port is not None else ():
            if reason := ports.bind_error(address, port or 0):
                raise ports.taken(address, port or 0, reason)

    def _choose_port(self) -> None:
        plan = self.spec
        if plan.port is not None:
            self.port = plan.port
        elif plan.addresses:
            self.port = ports.free_port(plan.addresses[0])

    def _undo(self) -> None:
        """Remove what a start that failed has made; what was kept before stays."""
        keep = self.existing is not None
        process, self._process = self._process, None
        if process is not None:
            self._end(process, keep=keep)
        else:
            rundir.discard(self.home.leftovers(keep=keep))
            self.home.release()


@contextmanager
def in_background(work: Callable[[], None]) -> Iterator[None]:
    """Do `work` in a thread for as long as the block takes, or longer; raises what it raised."""
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
    """Between our choice of a free port and the server's bind, somebody else took it."""
