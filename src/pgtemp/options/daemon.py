"""The options of a daemon, in addition to those of its servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pgtemp.errors import OptionError
from pgtemp.options.server import ServerOptions, StrPath, option

DEFAULT_HOST, DEFAULT_PORT = "localhost", 6543
ISOLATIONS = ("database", "cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonOptions(ServerOptions):
    """The options of a daemon. User, password and database are those of its servers.

    Raises:
        OptionError: a value is invalid; the error names the option and the reason.
    """

    host: str = option(DEFAULT_HOST, "the host to listen on; it must be this machine")
    listen: str | None = option(
        None,
        "address to listen on instead of the URI's host, * for all; addresses that other machines "
        "can reach require a password file",
        flag="--listen",
    )
    password_file: StrPath | None = option(
        None,
        "file with the password that every TCP client must give; without it, only root and the "
        "user who runs pgtemp can connect over TCP",
        flag="--password-file",
        env="PGTEMP_PASSWORD_FILE",
    )
    tls: str | None = option(
        None,
        "auto generates a certificate for this run; the daemon prints the path of the CA file that "
        "verifies it",
        flag="--tls",
        choices=("auto",),
    )
    tls_cert: StrPath | None = option(
        None, "TLS certificate with its chain (PEM)", flag="--tls-cert"
    )
    tls_key: StrPath | None = option(
        None, "private key of the certificate, if it is in another file", flag="--tls-key"
    )
    isolation: str = option(
        "database",
        "each lease gets its own database, or its own cluster (a whole server)",
        flag="--isolation",
        choices=ISOLATIONS,
    )
    single: bool = option(False, "all connections share one server", flag="--single")
    templates: Mapping[str, str] = option(
        dict,
        "template as NAME=PATH (SQL, a directory of SQL files, a dump, a persisted data directory) "
        "or 'NAME=cmd:COMMAND', which gets DATABASE_URL; NAME:OTHER=… starts from OTHER; "
        "may be given several times",
        flag="--template",
    )
    watch: Sequence[str] = option(
        (),
        "files that determine the result of a command, as NAME=GLOB; its template is then cached "
        "until they change; may be given several times",
        flag="--watch",
    )
    pool: int = option(
        2, "number of databases or servers that are ready for the next connections", flag="--pool"
    )
    linger: float = option(
        5.0,
        "seconds for which the lease of a session continues after its last connection closes",
        flag="--linger",
    )
    idle_ttl: float | None = option(
        None, "seconds without any traffic after which a lease ends", flag="--idle-ttl"
    )
    wait: float = option(
        60.0, "seconds a client waits for a lease before it is refused", flag="--wait"
    )
    max_databases: int | None = option(
        None, "maximum number of concurrent leases; further clients wait", flag="--max-databases"
    )
    max_connections_per_lease: int | None = option(
        None,
        "maximum number of concurrent connections per session",
        flag="--max-connections-per-lease",
    )
    role_attributes: str = option(
        "SUPERUSER",
        "attributes of roles that are created for connecting users",
        flag="--role-attributes",
    )

    @property
    def shares_servers(self) -> bool:
        """Whether independent leases share a server."""
        return self.isolation == "database" and not self.single

    @property
    def listen_port(self) -> int:
        """The TCP port, which is also part of the unix socket's file name."""
        return self.port if self.port is not None else DEFAULT_PORT

    def _check(self) -> None:
        ServerOptions._check(self)
        if "~" in self.dbname:
            raise OptionError(
                f"dbname={self.dbname!r}: only the URI of a client may contain ~ and a suffix",
                remedy="leave out ~ and the suffix here",
            )
        if not 0 <= self.pool <= 100:
            raise OptionError(
                f"pool={self.pool}: not a valid size", remedy="give a number from 0 to 100"
            )
        if self.isolation not in ISOLATIONS:
            raise OptionError(
                f"isolation={self.isolation!r}: unknown isolation",
                remedy=f"give one of {', '.join(ISOLATIONS)}",
            )
        for name in ("max_databases", "max_connections_per_lease"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise OptionError(
                    f"{name}={value}: not a valid limit", remedy="give a number above 0"
                )
        for name in ("linger", "idle_ttl", "wait"):
            if (value := getattr(self, name)) is not None and not 0 <= value < float("inf"):
                raise OptionError(
                    f"{name}={value}: not a valid time", remedy="give a number of seconds"
                )
        if not set(self.role_attributes.upper().split()) <= _ROLE_ATTRIBUTES:
            raise OptionError(
                f"role_attributes={self.role_attributes!r}: not attributes of a role",
                remedy=f"give some of {', '.join(sorted(_ROLE_ATTRIBUTES))}",
            )
        self._check_listeners()
        self._check_templates()

    def _check_listeners(self) -> None:
        for name in ("password_file", "tls_cert", "tls_key"):
            self._check_readable(name)
        if self.tls not in (None, "auto"):
            raise OptionError(
                f"tls={self.tls!r}: the only value is auto",
                remedy="give auto, or a certificate with --tls-cert",
            )
        if self.tls is not None and (self.tls_cert is not None or self.tls_key is not None):
            raise OptionError(
                "--tls auto generates its own certificate",
                remedy="leave out --tls auto, or --tls-cert and --tls-key",
            )
        if self.tls_key is not None and self.tls_cert is None:
            raise OptionError(
                "--tls-key was given without a certificate", remedy="give --tls-cert, too"
            )
        if self.password_file is not None and self.pg_hba_conf is not None:
            raise OptionError(
                "pg_hba.conf itself determines which clients need a password",
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
                f"{given[0]} has no effect without TCP",
                remedy=f"leave out --no-tcp, or {given[0]}",
            )

    def _check_templates(self) -> None:
        parents = {}
        for name, build in self.templates.items():
            own, _, parent = name.partition(":")
            if not own or "~" in own or not build.removeprefix("cmd:").strip():
                raise OptionError(
                    f"the template {name}={build} is invalid",
                    remedy="write NAME=PATH, 'NAME=cmd:COMMAND' or NAME:OTHER=…; no ~ in NAME",
                )
            if own in parents:
                raise OptionError(
                    f"there are two templates named {own}", remedy="give each a name of its own"
                )
            parents[own] = parent
        for own, parent in parents.items():
            above = [own]
            while parent:
                if parent not in parents or parent in above:
                    raise OptionError(
                        f"the template {above[-1]} cannot start from {parent}",
                        remedy=(
                            "remove the cycle: it would start from itself"
                            if parent in above
                            else f"define the template {parent}, too"
                        ),
                    )
                above.append(parent)
                parent = parents[parent]
        for one in self.watch:
            if one.partition("=")[0] not in parents:
                raise OptionError(
                    f"watch={one!r}: it does not start with the name of a template",
                    remedy="write NAME=GLOB",
                )
        if self.single and self.isolation == "cluster":
            raise OptionError(
                "with single there is one server, so isolation=cluster cannot be used",
                remedy="leave out single or isolation",
            )
        if self.single and self.templates:
            raise OptionError(
                "with single there is one database, so templates cannot be used",
                remedy="use load instead",
            )


_ATTRIBUTES = ("SUPERUSER", "CREATEDB", "CREATEROLE", "INHERIT", "REPLICATION", "BYPASSRLS")
_ROLE_ATTRIBUTES = {word for name in _ATTRIBUTES for word in (name, f"NO{name}")}
