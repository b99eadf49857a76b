"""The simplest interface: a server with one database, which is removed when it stops."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

import psycopg

from pgtemp import libpq
from pgtemp.allocation import persisted
from pgtemp.errors import ClusterError, OptionError
from pgtemp.host import ports
from pgtemp.images.source import Source
from pgtemp.options.server import ServerOptions, StrPath, takes_options
from pgtemp.programs.installation import Installation
from pgtemp.server.postmaster import Postmaster
from pgtemp.sql import dump_restore, server_setup
from pgtemp.sql.passwords import Secret, random_secret
from pgtemp.sql.persisted_note import Note, write_note
from pgtemp.supervisor import supervision
from pgtemp.uri import ConnectionInfo, parse, redact

T = TypeVar("T")
_HOST = "127.0.0.1"


class PgTempDB:
    """A PostgreSQL server with one database.

    It runs within a `with` block, or from `start()` to `stop()`. The keyword arguments are those of
    `pgtemp.ServerOptions`. The server is stopped when the process exits, even if the process is
    killed.

        with PgTempDB() as db:
            psycopg.connect(db.uri)

    Raises:
        OptionError: an option is invalid.
        InstallationError: no PostgreSQL was found.
        ClusterError: the server did not start; the error contains the end of the server log.
        TransferError: the dump could not be loaded.
    """

    @takes_options(ServerOptions)
    def __init__(self, options: ServerOptions) -> None:
        self._set_up(options)

    @classmethod
    def with_options(cls, options: ServerOptions, source: Source | None = None) -> Self:
        """Return a handle for an options object.

        Args:
            source: the image or directory that the server is copied from; None selects the one that
                the options determine.
        """
        self = cls.__new__(cls)
        self._set_up(options, source)
        return self

    def _set_up(self, options: ServerOptions, source: Source | None = None) -> None:
        self.options = options
        self._source = source
        self._host = _HOST
        self._postmaster: Postmaster | None = None
        self._info: ConnectionInfo | None = None
        self._persisted: Path | None = None  # the run directory, after `stop` has persisted it
        self._owner = os.getpid()
        self._changing = threading.Lock()

    @classmethod
    def from_uri(cls, uri: str, **options: Any) -> Self:
        """Return a handle with the host, port, user, password and database of a URL.

        Args:
            uri: the host must be this machine; parts that the URL omits have their defaults.
            options: the keyword arguments of the class.

        Raises:
            OptionError: the URL is invalid.
        """
        parts = parse(uri)
        for name in ("port", "user", "password", "dbname"):
            if (value := getattr(parts, name)) is not None:
                options.setdefault(name, value)
        handle = cls(**options)
        if parts.host is not None and not parts.host.startswith("/"):
            if not ports.loopback_addresses(parts.host):
                raise OptionError(
                    f"{redact(uri)!r}: {parts.host} is not this machine",
                    remedy="specify localhost; servers listen only on this machine",
                )
            handle._host = parts.host
        return handle

    def start(self) -> Self:
        """Start the server; does nothing if it is already running.

        Raises:
            PgTempError: see the class; nothing is left behind.
        """
        with self._changing:
            if self._postmaster is None:
                # Start the supervisor first, so that it is ready when it is needed.
                supervision.current()
                addresses = ports.loopback_addresses(self._host) if self.options.tcp else []
                plan = server_setup.plan(self.options, addresses)
                if self._source is not None:
                    spec = replace(plan.spec, source=self._source)
                    plan = replace(plan, spec=spec)
                secret = self._secret()
                postmaster = server_setup.provision(plan, secret)
                self._info = ConnectionInfo(
                    host=self._host if self.options.tcp else str(postmaster.socket_dir),
                    port=postmaster.port,
                    user=self.options.user,
                    password=secret.password if secret is not None else None,
                    dbname=self.options.dbname,
                )
                self._postmaster, self._persisted, self._owner = postmaster, None, os.getpid()
                _running.add(self)
        return self

    def stop(self) -> None:
        """Dump the database if `dump` is set, stop the server, and remove or persist its data.

        Nothing happens if the server is not running, or in a forked child, because the server
        belongs to the parent.

        Raises:
            PgTempError: the dump failed, or the note of the persisted data could not be written;
                the server is stopped anyway.
        """
        if self._owner != os.getpid():
            return
        with self._changing:
            postmaster, self._postmaster = self._postmaster, None
            if postmaster is None:
                return
            _running.discard(self)
            try:
                if self.options.dump is not None:
                    dump_restore.dump(
                        postmaster.spec.installation, self._private(postmaster), self.options.dump
                    )
            finally:
                try:
                    if self.options.persist:
                        self._persisted = postmaster.home.path
                        write_note(self._persisted, Note(self.options.user, self.options.dbname))
                finally:
                    postmaster.stop()

    def dump(self, path: StrPath) -> None:
        """Dump the database as SQL, with pg_dump.

        Raises:
            TransferError: the dump failed; an existing file of that name is unchanged.
        """
        postmaster = self._running_postmaster()
        dump_restore.dump(postmaster.spec.installation, self._private(postmaster), path)

    def load(self, path: StrPath) -> None:
        """Load a dump: SQL with psql, pg_dump's other formats with pg_restore.

        Raises:
            TransferError: the dump could not be loaded; the database is unchanged.
        """
        postmaster = self._running_postmaster()
        dump_restore.load(postmaster.spec.installation, self._private(postmaster), path)

    def store(self, directory: StrPath, databases: Mapping[str, str]) -> None:
        """Shut the server down and persist its data in a directory, for `pgtemp open`.

        Args:
            directory: the directory; it must not exist yet.
            databases: the databases to record, each with its origin, such as the name of a test;
                `pgtemp open` opens the first.

        Raises:
            ClusterError: the directory is not writable; nothing is left behind.
        """
        note = Note(self.options.user, next(iter(databases)), databases)
        persisted.store(self._running_postmaster(), Path(directory).absolute(), note)

    def check(self) -> None:
        """Raise ClusterError, with the end of the server log, if the server has exited."""
        self._running_postmaster().check()

    def connect(self, **kwargs: Any) -> psycopg.Connection[Any]:
        """Return a psycopg connection to the database; keyword arguments are psycopg's."""
        return libpq.connect(psycopg.Connection, self.info, kwargs)

    @property
    def uri(self) -> str:
        """The URL for any driver, with the password."""
        return self._running_info().uri

    @property
    def info(self) -> ConnectionInfo:
        """Host, port, user, password and database in one value."""
        return self._running_info()

    @property
    def host(self) -> str:
        """The host; without TCP, the socket's directory."""
        return self._running_info().host

    @property
    def port(self) -> int:
        """The TCP port; without TCP, the number in the socket's name."""
        return self._running_info().port

    @property
    def user(self) -> str:
        return self._running_info().user

    @property
    def password(self) -> str | None:
        """The password; None without TCP."""
        return self._running_info().password

    @property
    def dbname(self) -> str:
        return self._running_info().dbname

    @property
    def socket_dir(self) -> Path:
        """The directory of the unix socket; other users cannot enter it. No password is needed."""
        return self._running_postmaster().socket_dir

    @property
    def data_dir(self) -> Path:
        """The data directory; after `stop()`, the persisted one."""
        if self._persisted is not None:
            return self._persisted / "data"
        return self._running_postmaster().data_dir

    @property
    def log_path(self) -> Path:
        """The file of the server log."""
        return self._running_postmaster().log_path

    @property
    def installation(self) -> Installation:
        """The PostgreSQL installation of the server."""
        return self._running_postmaster().spec.installation

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        return self._running_postmaster().pid

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        if self._postmaster is None or self._info is None:
            return f"<PgTempDB({self.options.describe()}) not running>"
        return f"<PgTempDB {redact(self._info.uri)} pid={self._postmaster.pid}>"

    def __del__(self) -> None:
        # Close the server's channel; the supervisor then stops the server.
        postmaster = getattr(self, "_postmaster", None)
        if postmaster is not None and self._owner == os.getpid():
            postmaster.abandon()

    def _secret(self) -> Secret | None:
        if not self.options.tcp:
            return None
        given = self.options.password
        return Secret(given) if given is not None else random_secret()

    def _private(self, postmaster: Postmaster) -> ConnectionInfo:
        return server_setup.private_info(postmaster, self.options.user, self.options.dbname)

    def _running_postmaster(self) -> Postmaster:
        return _running_or_error(self._postmaster)

    def _running_info(self) -> ConnectionInfo:
        _running_or_error(self._postmaster)
        return _running_or_error(self._info)


def _running_or_error(value: T | None) -> T:
    if value is None:
        raise ClusterError("the server is not running", remedy="call start(), or use `with`")
    return value


_running: weakref.WeakSet[PgTempDB] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Dump, persist and stop all running servers when the interpreter exits."""
    for handle in list(_running):
        handle.stop()
