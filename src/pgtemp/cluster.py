"""One server, many databases: each a clone of a template, from a pool kept ready.

    with Cluster() as cluster:
        app = cluster.template("app", build=migrate)
        with app.database() as db:
            psycopg.connect(db.uri)

A server takes thirty milliseconds to start, a clone ten, and one that is ready already none.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg import errors

from pgtemp.databases import admin, transfer
from pgtemp.databases.admin import Admins
from pgtemp.databases.pool import Pool
from pgtemp.databases.template import BASE, Build, Builder, Clones, in_use, unique_name
from pgtemp.errors import ClusterError, OptionError
from pgtemp.options import ServerOptions, StrPath, takes_options
from pgtemp.pgtempdb import PgTempDB
from pgtemp.server.installation import Installation
from pgtemp.uri import ConnectionInfo, redact

READY = 2  # clones kept ready of each template that is in use


@dataclass(frozen=True, slots=True)
class _Works:
    """What the databases of a running cluster share."""

    admins: Admins
    info: ConnectionInfo
    programs: Installation
    owner: str

    def info_of(self, dbname: str) -> ConnectionInfo:
        return replace(self.info, dbname=dbname)


class Cluster:
    """A PostgreSQL server for many databases. Keyword arguments are `pgtemp.ServerOptions`.

    `dbname` is not used: databases come from `database()` and from templates. `dump` and `load`
    are those of a database or a template.

    Raises:
        PgTempError: as for `PgTempDB`.
    """

    @takes_options(ServerOptions)
    def __init__(self, options: ServerOptions) -> None:
        self._set_up(options)

    @classmethod
    def with_options(cls, options: ServerOptions) -> Self:
        """A cluster for options that are there as one value."""
        self = cls.__new__(cls)
        self._set_up(options)
        return self

    def _set_up(self, options: ServerOptions) -> None:
        for name in ("dump", "load"):
            if getattr(options, name) is not None:
                raise OptionError(
                    f"{name}= is not for a cluster",
                    remedy="use template(build=…) to load, and Database.dump() to dump",
                )
        self._server = PgTempDB.with_options(options)
        self._owner = os.getpid()
        self._works: _Works | None = None
        self._builder: Builder | None = None
        self._templates: dict[str, Template] = {}
        self._empty: Template | None = None
        self._changing = threading.Lock()

    def start(self) -> Self:
        """Start the server; what is running already stays."""
        with self._changing:
            if self._works is None:
                server = self._server.start()
                to = ConnectionInfo(
                    host=str(server.socket_dir),
                    port=server.port,
                    user=server.user,
                    dbname=admin.MAINTENANCE,
                )
                works = _Works(Admins(to), server.info, server.installation, server.user)
                self._builder = Builder(
                    works.admins, works.programs, works.owner, lambda name: works.info_of(name).uri
                )
                self._works, self._owner = works, os.getpid()
                _running.add(self)
        return self

    def stop(self) -> None:
        """End the server with all its databases; nothing happens in a forked child."""
        if self._owner != os.getpid():
            return
        with self._changing:
            works, self._works = self._works, None
            templates = [*self._templates.values(), *([self._empty] if self._empty else [])]
            self._templates, self._empty = {}, None
        if works is None:
            return
        _running.discard(self)
        works.admins.closing.set()
        for template in templates:
            template._pool.refuse()
        try:
            self._server.stop()  # whoever still makes or drops databases finds out at once
        finally:
            for template in templates:
                template._pool.close(dispose=False)
            works.admins.close()

    def template(self, name: str, build: Build) -> Template:
        """A template, built when its name is first used.

        Args:
            name: whatever the suite calls it.
            build: a callable that gets a URI; a path of SQL, of a directory of SQL files, or of a
                dump; or several paths.

        Raises:
            PgTempError: the build failed; nothing of it is left.
        """
        return self._template(name, build, BASE)

    def database(self) -> Database:
        """An empty database of one's own, claimed from those kept ready."""
        return self._default().database()

    @property
    def info(self) -> ConnectionInfo:
        """Host, port, user and password of the server."""
        return self._running().info

    @property
    def server(self) -> PgTempDB:
        """The server itself, with its directory, log and pid."""
        return self._server

    def _default(self) -> Template:
        with self._changing:
            works = self._running()
            if self._empty is None:
                self._empty = Template(self, works, "empty", BASE)
            return self._empty

    def _template(self, name: str, build: Build, source: str) -> Template:
        works = self._running()
        assert self._builder is not None
        dbname = self._builder.ensure(name, build, source)
        with self._changing:
            if self._works is not works:
                self._running()
                raise ClusterError("the cluster was started anew meanwhile", remedy="ask again")
            if name not in self._templates:
                self._templates[name] = Template(self, works, name, dbname)
            return self._templates[name]

    def _running(self) -> _Works:
        if self._works is None:
            raise ClusterError("the cluster is not running", remedy="call start(), or use `with`")
        return self._works

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Cluster {self._server!r}>"


class Template:
    """A sealed database that others are cloned from; made by `Cluster.template`."""

    def __init__(self, cluster: Cluster, works: _Works, name: str, dbname: str) -> None:
        self.name = name
        self.dbname = dbname
        self._cluster = cluster
        self._works = works
        self._pool: Pool[str] = Pool(Clones(works.admins, dbname, works.owner, name), ready=READY)

    def database(self) -> Database:
        """A clone of one's own, claimed from those kept ready.

        Raises:
            PgTempError: it could not be made.
        """
        return Database(self._works, self._pool.take(), self._pool)

    def template(self, name: str, build: Build) -> Template:
        """A template that starts from this one."""
        return self._cluster._template(name, build, self.dbname)

    def __repr__(self) -> str:
        return f"<Template {self.name!r}>"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A database as it was at some moment; made by `Database.snapshot`."""

    name: str
    dbname: str


class Database:
    """One clone, with a URL. Given back with `close()` or at the end of `with`."""

    def __init__(self, works: _Works, dbname: str, pool: Pool[str]) -> None:
        self._works = works
        self._pool = pool
        self._open = True
        self._snapshots: list[Snapshot] = []
        self.info = works.info_of(dbname)

    @property
    def uri(self) -> str:
        """The URL for any driver, with the password."""
        return self.info.uri

    @property
    def dbname(self) -> str:
        return self.info.dbname

    def connect(self, **kwargs: Any) -> psycopg.Connection[Any]:
        """A psycopg connection to the database; keyword arguments are psycopg's."""
        return psycopg.connect(self.uri, **kwargs)

    def dump(self, path: StrPath) -> None:
        """Dump the database as SQL. Raises TransferError."""
        transfer.dump(self._works.programs, self._private(), path)

    def load(self, path: StrPath) -> None:
        """Load a dump, all of it or nothing. Raises TransferError."""
        transfer.load(self._works.programs, self._private(), path)

    def snapshot(self, name: str) -> Snapshot:
        """Keep the database as it is now, until it is closed; nobody else may be connected to it.

        Raises:
            ClusterError: somebody is; says who.
        """
        snapshot = Snapshot(name, self._copy(f"snapshot_{name}"))
        self._snapshots.append(snapshot)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Make the database what it was; whoever is connected to it is disconnected."""
        self._check_open()
        works, fresh = self._works, unique_name("restored")
        with works.admins.connection() as connection:
            # The old one goes only when the new one is there.
            admin.clone(connection, fresh, snapshot.dbname, works.owner)
            admin.drop(connection, self.dbname, works.admins.elsewhere(self.dbname))
            admin.rename(connection, fresh, self.dbname)

    def fork(self) -> Database:
        """Another database that begins as this one is now; nobody else may be connected to it.

        Raises:
            ClusterError: somebody is; says who.
        """
        return Database(self._works, self._copy("fork"), self._pool)

    def close(self) -> None:
        """Drop the database and its snapshots, behind the caller's back."""
        if self._open:
            self._open = False
            for dbname in (self.dbname, *(snapshot.dbname for snapshot in self._snapshots)):
                self._pool.retire(dbname)

    def _check_open(self) -> None:
        if not self._open:
            raise ClusterError(f"{self.dbname} is closed", remedy="claim another")

    def _copy(self, prefix: str) -> str:
        self._check_open()
        name = unique_name(prefix)
        with self._works.admins.connection() as connection:
            try:
                admin.clone(connection, name, self.dbname, self._works.owner)
            except errors.ObjectInUse as error:
                raise in_use(connection, self.dbname) from error
        return name

    def _private(self) -> ConnectionInfo:
        return self._works.admins.elsewhere(self.dbname)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Database {redact(self.uri)}>"


_running: weakref.WeakSet[Cluster] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for cluster in list(_running):
        cluster.stop()
