"""What a daemon is started with, beyond what servers are made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pgtemp.errors import OptionError
from pgtemp.options.server import ServerOptions, StrPath, option

DEFAULT_HOST, DEFAULT_PORT = "localhost", 6543
ISOLATIONS = ("database", "cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonOptions(ServerOptions):
    """What a daemon is started with. User, password and database are those of its servers."""

    host: str = option(DEFAULT_HOST, "the host to listen on: this machine")
    listen: str | None = option(
        None,
        "address to listen on instead of the URI's host, * for all; beyond this machine only with "
        "a password file",
        flag="--listen",
    )
    password_file: StrPath | None = option(
        None,
        "file with the password that everybody needs who comes by TCP; else it is the user who "
        "runs pgtemp, and root",
        flag="--password-file",
        env="PGTEMP_PASSWORD_FILE",
    )
    tls: str | None = option(
        None,
        "auto makes a certificate for the run, and says which file vouches for it",
        flag="--tls",
        choices=("auto",),
    )
    tls_cert: StrPath | None = option(
        None, "certificate, with its chain, to speak TLS with (PEM)", flag="--tls-cert"
    )
    tls_key: StrPath | None = option(
        None, "its key, where that is not in the same file", flag="--tls-key"
    )
    isolation: str = option(
        "database",
        "what each lease gets of its own: a database, or a cluster (a whole server)",
        flag="--isolation",
        choices=ISOLATIONS,
    )
    single: bool = option(False, "all connections share one server", flag="--single")
    templates: Mapping[str, str] = option(
        dict,
        "template as NAME=PATH (SQL, a directory of SQL files, a dump, a data directory that was "
        "kept) or 'NAME=cmd:COMMAND', which gets DATABASE_URL; NAME:OTHER=… starts from OTHER; "
        "may be given several times",
        flag="--template",
    )
    watch: Sequence[str] = option(
        (),
        "files that decide how a command comes out, as NAME=GLOB; its template is then kept until "
        "they change; may be given several times",
        flag="--watch",
    )
    pool: int = option(2, "databases or servers kept ready for the next connections", flag="--pool")
    linger: float = option(
        5.0, "seconds a session stays after its last connection", flag="--linger"
    )
    idle_ttl: float | None = option(
        None, "seconds without a byte after which a lease ends", flag="--idle-ttl"
    )
    wait: float = option(
        60.0, "seconds a client waits for its turn before it is refused", flag="--wait"
    )
    max_databases: int | None = option(
        None, "leases at once; further clients wait for their turn", flag="--max-databases"
    )
    max_connections_per_lease: int | None = option(
        None, "connections of one session at once", flag="--max-connections-per-lease"
    )
    role_attributes: str = option(
        "SUPERUSER", "attributes of roles made for the users that connect", flag="--role-attributes"
    )

    @property
    def shares_servers(self) -> bool:
        """Whether leases that know nothing of each other are in one server."""
        return self.isolation == "database" and not self.single

    @property
    def listen_port(self) -> int:
        """The TCP port, which also names the unix socket."""
        return self.port if self.port is not None else DEFAULT_PORT

    def _check(self) -> None:
        ServerOptions._check(self)
        if "~" in self.dbname:
            raise OptionError(
                f"dbname={self.dbname!r}: what follows ~ is for those who connect",
                remedy="leave it out here",
            )
        if not 0 <= self.pool <= 100:
            raise OptionError(f"pool={self.pool}: not a size", remedy="give one from 0 to 100")
        if self.isolation not in ISOLATIONS:
            raise OptionError(
                f"isolation={self.isolation!r}: there is none of that name",
                remedy=f"give one of {', '.join(ISOLATIONS)}",
            )
        for name in ("max_databases", "max_connections_per_lease"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise OptionError(f"{name}={value}: not a limit", remedy="give a number above 0")
        for name in ("linger", "idle_ttl", "wait"):
            if (value := getattr(self, name)) is not None and not 0 <= value < float("inf"):
                raise OptionError(f"{name}={value}: not a time", remedy="give seconds")
        if not set(self.role_attributes.upper().split()) <= _ROLE_ATTRIBUTES:
            raise OptionError(
                f"role_attributes={self.role_attributes!r}: not attributes of a role",
                remedy=f"give some of {', '.join(sorted(_ROLE_ATTRIBUTES))}",
            )
        self._check_doors()
        self._check_templates()

    def _check_doors(self) -> None:
        for name in ("password_file", "tls_cert", "tls_key"):
            self._check_readable(name)
        if self.tls not in (None, "auto"):
            raise OptionError(f"tls={self.tls!r}: there is only auto", remedy="give a certificate")
        if self.tls is not None and (self.tls_cert is not None or self.tls_key is not None):
            raise OptionError(
                "with --tls auto a certificate is made", remedy="leave out one or the other"
            )
        if self.tls_key is not None and self.tls_cert is None:
            raise OptionError("a key alone is no certificate", remedy="give --tls-cert, too")
        if self.password_file is not None and self.pg_hba_conf is not None:
            raise OptionError(
                "a pg_hba.conf says itself who needs a password",
                remedy="leave out --password-file or --pg-hba-conf",
            )
        if not self.tcp and (
            given := [
                name
                for name in ("listen", "password_file", "tls", "tls_cert")
                if getattr(self, name) is not None
            ]
        ):
            raise OptionError(
                f"without TCP there is nothing that {given[0]} says", remedy="leave out --no-tcp"
            )

    def _check_templates(self) -> None:
        parents = {}
        for name, build in self.templates.items():
            own, _, parent = name.partition(":")
            if not own or "~" in own or not build.removeprefix("cmd:").strip():
                raise OptionError(
                    f"the template {name}={build} cannot be made",
                    remedy="write NAME=PATH, 'NAME=cmd:COMMAND' or NAME:OTHER=…; no ~ in NAME",
                )
            if own in parents:
                raise OptionError(f"there are two templates {own}", remedy="name each once")
            parents[own] = parent
        for own, parent in parents.items():
            above = [own]
            while parent:
                if parent not in parents or parent in above:
                    raise OptionError(
                        f"the template {above[-1]} cannot start from {parent}",
                        remedy="it is itself" if parent in above else "give that one, too",
                    )
                above.append(parent)
                parent = parents[parent]
        for one in self.watch:
            if one.partition("=")[0] not in parents:
                raise OptionError(
                    f"watch={one!r}: there is no such template", remedy="write NAME=GLOB"
                )
        if self.single and self.templates:
            raise OptionError(
                "with single there is one database, and no templates", remedy="use load instead"
            )


_ATTRIBUTES = ("SUPERUSER", "CREATEDB", "CREATEROLE", "INHERIT", "REPLICATION", "BYPASSRLS")
_ROLE_ATTRIBUTES = {word for name in _ATTRIBUTES for word in (name, f"NO{name}")}
