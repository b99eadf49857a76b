"""The parameters of a server, and its files, its log and its command line, which they determine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pgtemp.errors import OptionError
from pgtemp.host import disk_space, paths, ports, processes, user_paths
from pgtemp.host.identity import Identity
from pgtemp.host.tree import Tree
from pgtemp.images.source import CONF, Source
from pgtemp.programs.installation import Installation
from pgtemp.server.rundir import RunDirectory
from pgtemp.supervisor.channel import Request

SOCKET_PORT = 5432  # the port in the socket's file name if the server does not listen on TCP
_CONF_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """The parameters of a server; several servers may share one specification.

    Attributes:
        source: the source from which the data directory is copied.
        conf: a function that generates the text of postgresql.conf from that of the source.
        hba: the text of pg_hba.conf.
        addresses: loopback addresses to listen on; if there are none, only the unix socket is used.
        port: the TCP port; None chooses a free one.
        prefix: the directory in which the run directory is created; None chooses one.
        keep: whether the data is persisted.
        ttl: seconds after which the supervisor stops the server, even if it is in use.
        log_path: the file for the server log; None selects a file in the run directory.
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

    def check_port(self) -> None:
        """Raise OptionError if a server cannot listen on the requested port."""
        if self.port is not None:
            for address in self.addresses:
                if reason := ports.bind_error(address, self.port):
                    raise ports.taken(address, self.port, reason)

    def choose_port(self) -> int:
        """The requested port, or a free one, which another process may take at any time."""
        if self.port is not None:
            return self.port
        return ports.free_port(*self.addresses) if self.addresses else SOCKET_PORT

    def write_config(self, data: Tree) -> None:
        """Write the server's configuration to a copy of its source. Raises OSError."""
        try:
            conf = data.read(CONF, _CONF_BYTES).decode(errors="surrogateescape")
        except FileNotFoundError:
            conf = ""
        data.write(CONF, self.conf(conf).encode(errors="surrogateescape"))
        data.write("pg_hba.conf", self.hba.encode(errors="surrogateescape"))

    def open_log(self, run_dir: RunDirectory) -> int:
        """Open the server log for writing, and return its descriptor. Raises PgTempError."""
        path = self.log_path or run_dir.log
        try:
            return user_paths.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            if self.log_path is None:
                raise disk_space.cannot_write(run_dir.path, error) from error
            raise OptionError(
                f"cannot write to {path}: {error.strerror}",
                remedy="specify another file (log_path)",
            ) from error

    def request(self, run_dir: RunDirectory, port: int) -> Request:
        """The request to start a postmaster in a run directory."""
        settings = {
            "listen_addresses": ",".join(self.addresses),
            "port": str(port),
            "unix_socket_permissions": "0700",
            "unix_socket_directories": str(run_dir.socket_dir),
            "hba_file": str(run_dir.data / "pg_hba.conf"),
        }
        # On the command line, because ALTER SYSTEM in a copied data directory overrides any file.
        argv = [str(self.installation.program("postgres")), "-D", str(run_dir.data)]
        argv += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return Request(
            argv=argv,
            env=processes.clean_environment(),
            uid=self.owner.uid if self.owner.switch else None,
            gid=self.owner.gid if self.owner.switch else None,
            data_dir=str(run_dir.data),
            ttl=self.ttl,
            sweep=[str(base) for base in {*paths.sweep_bases(), run_dir.path.parent}],
        )
