"""The options of a server: name, type, default, environment variable and help of each.

The library's keyword arguments, the command line's flags and the documentation's table derive
from the fields below. A given value takes precedence over the environment variable, which takes
precedence over the default.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from pgtemp.errors import OptionError

StrPath = str | os.PathLike[str]
_KINDS: tuple[tuple[tuple[str, ...], tuple[type, ...], str], ...] = (
    (("port",), (int,), "a number"),
    (("ttl",), (int, float), "a number of seconds"),
    (("persist", "tcp"), (bool,), "True or False"),
    (("user", "password", "dbname", "version", "run_as"), (str,), "a string"),
    (("config", "initdb_args"), (Mapping,), "a mapping of names to values"),
    (("extensions",), (list, tuple), "a list of names"),
    (
        ("data_dir_prefix", "dump", "load", "copy_from", "postgresql_conf", "pg_hba_conf",
         "bin_dir", "log_path"),
        (str, os.PathLike),
        "a path",
    ),
)  # fmt: skip
# Settings that pgtemp itself sets on the server's command line, and the remedy for each.
_RESERVED = {
    "port": "give the port in the URI, or as `port`",
    "listen_addresses": "servers listen on this machine only; see `tcp`",
    "unix_socket_directories": "leave it out; pgtemp creates the socket's directory",
    "hba_file": "see `pg_hba_conf`",
    "data_directory": "see `data_dir_prefix`",
    "config_file": "see `postgresql_conf`",
}
_SETTING = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)?")


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    env: str | None = None,
    secret: bool = False,
    choices: Sequence[str] = (),
) -> Any:
    """Return a dataclass field, with metadata for the command line and the documentation.

    Args:
        default: the default, or a callable that returns it.
        help: one sentence for `--help` and docs/options.md.
        flag: the command line's flag; None if there is none.
        env: the environment variable; None if there is none.
        secret: whether repr() must not show the value.
        choices: the allowed values; empty if any value is allowed.
    """
    metadata = {"help": help, "flag": flag, "env": env, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=metadata, repr=not secret)
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """The options of a server. Each has a default that works.

    Raises:
        OptionError: a value is invalid; the error names the option and the reason.
    """

    port: int | None = option(None, "TCP port; a free one is chosen by default")
    user: str = option("postgres", "name of the database superuser that is created")
    password: str | None = option(
        None, "password of that user; a random one by default", secret=True
    )
    dbname: str = option("postgres", "name of the database; created if it does not exist")
    data_dir_prefix: StrPath | None = option(
        None,
        "directory for the run directories of servers; by default a tmpfs with enough space, else "
        "the temporary directory; for persisted data ~/.local/share/pgtemp (root: /var/lib/pgtemp)",
        flag="--data-dir-prefix",
        env="PGTEMP_DATA_DIR_PREFIX",
    )
    persist: bool = option(
        False, "persist the data directory, on disk, when the server stops", flag="--persist"
    )
    dump: StrPath | None = option(
        None,
        "file to which the database is dumped when the server stops; files of the daemon are "
        "numbered: out-1.sql, out-2.sql, unless --single",
        flag="--dump",
    )
    load: StrPath | None = option(
        None,
        "dump to load when the server starts: SQL, or any format of pg_dump",
        flag="--load-from",
    )
    extensions: Sequence[str] = option(
        (),
        "extensions to create in databases, a list of names; the name all stands for every "
        "extension that can be created; the flag gives one name and may be repeated",
        flag="--extension",
    )
    copy_from: StrPath | None = option(
        None, "prepared data directory to start from; copied, never changed", flag="--copy-from"
    )
    config: Mapping[str, str] = option(
        dict,
        "server settings, a mapping; the flag gives one as NAME=VALUE and may be repeated",
        flag="-o",
    )
    postgresql_conf: StrPath | None = option(
        None,
        "postgresql.conf to use; `config` takes precedence over it",
        flag="--postgresql-conf",
    )
    pg_hba_conf: StrPath | None = option(None, "pg_hba.conf to use", flag="--pg-hba-conf")
    initdb_args: Mapping[str, str] = option(
        dict,
        "long options of initdb without dashes, a mapping; the flag gives one as NAME=VALUE and "
        "may be repeated",
        flag="--initdb-arg",
    )
    bin_dir: StrPath | None = option(
        None, "directory of PostgreSQL's programs", flag="--bin-dir", env="PGTEMP_BIN"
    )
    version: str | None = option(
        None,
        'version of PostgreSQL: 16, 16.4, ">=16,<18"',
        flag="--pg-version",
        env="PGTEMP_VERSION",
    )
    log_path: StrPath | None = option(
        None, "file for the server log; by default in the run directory", flag="--log-path"
    )
    ttl: float | None = option(
        None,
        "seconds after which a server is removed even if it is in use; in the daemon, the time "
        "limit of each lease",
        flag="--ttl",
    )
    run_as: str | None = option(
        None,
        "user to run PostgreSQL as, when started by root; by default postgres, else nobody",
        flag="--run-as",
        env="PGTEMP_RUN_AS",
    )
    tcp: bool = option(
        True, "listen on TCP; otherwise on the unix socket only", flag="--tcp/--no-tcp"
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            variable = spec.metadata["env"]
            if variable and getattr(self, spec.name) is None and os.environ.get(variable):
                object.__setattr__(self, spec.name, os.environ[variable])
        self._check()

    def _check_types(self) -> None:
        if isinstance(self.version, int | float):
            object.__setattr__(self, "version", str(self.version))
        for names, kinds, kind in _KINDS:
            for name in names:
                value = getattr(self, name, None)
                if value is not None and (
                    not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
                ):
                    raise OptionError(f"{name}={value!r}: not {kind}", remedy=f"give {kind}")

    def _check(self) -> None:
        self._check_types()
        if self.port is not None and not 1 <= self.port <= 65535:
            raise OptionError(
                f"port={self.port}: not a valid port", remedy="give a number from 1 to 65535"
            )
        for name in ("user", "dbname"):
            value = getattr(self, name)
            if not value or "\0" in value or len(value.encode()) > 63:
                raise OptionError(
                    f"{name}={value!r}: a name in PostgreSQL has 1 to 63 bytes",
                    remedy=f"choose another {name}",
                )
        if self.password is not None and (not self.password or "\0" in self.password):
            fault = "contains a NUL byte" if self.password else "is empty"
            raise OptionError(
                f"the password {fault}", remedy="omit it to have a random one generated"
            )
        if self.ttl is not None and not (0 < self.ttl < float("inf")):
            raise OptionError(
                f"ttl={self.ttl}: not a valid time", remedy="give a number of seconds above 0"
            )
        for name, value in self.config.items():
            if not _SETTING.fullmatch(name) or "\n" in str(value) or "\0" in str(value):
                raise OptionError(
                    f"{name!r}: {str(value)[:50]!r} is not a server setting",
                    remedy="write settings like max_connections=50",
                )
            if name.lower() in _RESERVED:
                raise OptionError(
                    f"the setting {name} cannot be changed", remedy=_RESERVED[name.lower()]
                )
        for name in ("load", "postgresql_conf", "pg_hba_conf"):
            self._check_readable(name)
        if self.copy_from is not None and not any(
            (Path(self.copy_from) / inside / "PG_VERSION").is_file() for inside in ("", "data")
        ):
            raise OptionError(
                f"{os.fspath(self.copy_from)} is not a data directory: it has no PG_VERSION",
                remedy="specify a directory created by initdb or pgtemp (copy_from)",
            )
        for name in ("dump", "log_path"):
            path = getattr(self, name)
            if path is not None and not Path(path).absolute().parent.is_dir():
                raise OptionError(
                    f"{os.fspath(path)}: the directory {Path(path).absolute().parent} does not "
                    "exist",
                    remedy=f"create it, or specify another file ({name})",
                )
            if path is not None and Path(path).is_dir():
                raise OptionError(
                    f"{os.fspath(path)} is a directory", remedy=f"specify a file ({name})"
                )
        if self.dump is not None and Path(self.dump).exists() and not Path(self.dump).is_file():
            raise OptionError(
                f"{os.fspath(self.dump)} is not a regular file",
                remedy="specify another file (dump)",
            )

    def _check_readable(self, name: str) -> None:
        path = getattr(self, name)
        if path is None:
            return
        try:
            # A dump may be a directory, a settings file may not. Do not open a pipe here: it can be
            # read only once.
            if not (name == "load" and Path(path).is_dir()) and not Path(path).is_fifo():
                with open(path, "rb"):
                    pass
        except OSError as error:
            raise OptionError(
                f"{os.fspath(path)} cannot be read: {error.strerror}",
                remedy=f"specify a file that exists and that you can read ({name})",
            ) from error

    def describe(self) -> str:
        """Return the options that differ from their defaults, without the password."""
        shown = [
            f"{spec.name}={getattr(self, spec.name)!r}"
            for spec in fields(self)
            if spec.name != "password" and getattr(self, spec.name) != default_of(spec)
        ]
        return ", ".join(shown)


def default_of(spec: Field[Any]) -> Any:
    """Return the default value of an option's field."""
    if spec.default_factory is not MISSING:
        return spec.default_factory()
    return spec.default


P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


def takes_options(
    make: Callable[P, ServerOptions],
) -> Callable[[Callable[[S, ServerOptions], R]], Callable[Concatenate[S, P], R]]:
    """Turn a method that takes an options object into one that takes the options as keywords.

    The options are then declared only once, and editors, type checkers and help() see all of them.
    """

    def wrap(method: Callable[[S, ServerOptions], R]) -> Callable[Concatenate[S, P], R]:
        @functools.wraps(method)
        def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            return method(self, make(*args, **kwargs))

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        signature = inspect.signature(make)
        call.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[own, *signature.parameters.values()]
        )
        return call

    return wrap
