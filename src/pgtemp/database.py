"""A private database for a test: one clone, with a URL."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg import errors

from pgtemp.allocation.pool import Pool
from pgtemp.errors import ClusterError
from pgtemp.options.server import StrPath
from pgtemp.pgtempdb import PgTempDB
from pgtemp.sql import admin_sql, dump_restore
from pgtemp.templates.clones import Clones, in_use, unique_name
from pgtemp.uri import ConnectionInfo, redact
from pgtemp.works import Works


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of a database at one point in time; made by `Database.snapshot`."""

    name: str
    dbname: str


class Database:
    """One clone, with a URL. It is given back by `close()` or at the end of `with`."""

    def __init__(
        self, works: Works, dbname: str, pool: Pool[str], clones: Clones | None = None
    ) -> None:
        """Databases are made by `Template.database` and `Cluster.database`.

        Args:
            works: the server that contains the database.
            pool: the pool that the database is given back to.
            clones: the clones of its template, if it is a clone from the pool; None for a fork.
        """
        self.works = works
        self._pool = pool
        self._clones = clones
        self._since = works.now()
        self._open = True
        self._snapshots: list[Snapshot] = []
        self.connections: list[psycopg.Connection[Any] | psycopg.AsyncConnection[Any]] = []
        self._warm = clones.take_warm(dbname) if clones is not None else None
        if self._warm is not None:
            self.connections.append(self._warm.connection)
        self._info = works.info_of(dbname)
        self.was_shown = False  # whether clients may have connected in other ways than by `connect`

    @property
    def info(self) -> ConnectionInfo:
        """Host, port, user, password and database in one value."""
        self._close_warm()  # the client may need to be the only session
        self.was_shown = True
        return self._info

    @property
    def uri(self) -> str:
        """The URL for any driver, with the password."""
        return self.info.uri

    @property
    def dbname(self) -> str:
        return self._info.dbname

    @property
    def server(self) -> PgTempDB:
        """The server that contains the database, with its directory, log and pid."""
        self.was_shown = True
        return self.works.server

    def connect(self, **kwargs: Any) -> psycopg.Connection[Any]:
        """Return a psycopg connection to the database; keyword arguments are psycopg's.

        The connection is closed with the database, if not before.
        """
        warm, self._warm = self._warm, None
        if not kwargs:
            if warm is not None and warm.is_usable():
                return warm.connection
            if self._clones is not None:  # open warm connections to the next clones
                self._clones.warm = self.works.open_warm
        if warm is not None:
            warm.connection.close()
        connection = psycopg.connect(self._info.uri, **kwargs)
        self.connections.append(connection)
        return connection

    async def aconnect(self, **kwargs: Any) -> psycopg.AsyncConnection[Any]:
        """Return an asynchronous psycopg connection; see `connect`."""
        self._close_warm()
        connection = await psycopg.AsyncConnection.connect(self._info.uri, **kwargs)
        self.connections.append(connection)
        return connection

    def psql(self, command: str | None = None) -> str:
        r"""Return the output of psql for a command: SQL, or a command of psql such as `\d`.

        Without a command, psql runs on the terminal until it exits; the result is then "".

        Raises:
            TransferError: the command failed, or there is no terminal.
        """
        programs = self.works.server.installation
        if command is not None:
            return dump_restore.psql(programs, self._private(), command)
        dump_restore.psql_on_terminal(programs, self._private())
        return ""

    def dump(self, path: StrPath) -> None:
        """Dump the database as SQL. Raises TransferError."""
        dump_restore.dump(self.works.server.installation, self._private(), path)

    def load(self, path: StrPath) -> None:
        """Load a dump, completely or not at all. Raises TransferError."""
        dump_restore.load(self.works.server.installation, self._private(), path)

    def snapshot(self, name: str) -> Snapshot:
        """Copy the current state of the database; it must have no other sessions.

        The copy exists until the database is closed.

        Raises:
            ClusterError: other sessions are connected; the error lists them.
        """
        snapshot = Snapshot(name, self._copy(f"snapshot_{name}"))
        self._snapshots.append(snapshot)
        return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Reset the database to a snapshot; its sessions are terminated."""
        self._check_open()
        self._close_warm()
        works, fresh = self.works, unique_name("restored")
        with works.admins.connection() as connection:
            # Drop the old database only after the new one was made.
            admin_sql.clone(connection, fresh, snapshot.dbname, works.server.user)
            try:
                admin_sql.drop(connection, self.dbname, works.admins.info_of(self.dbname))
                admin_sql.rename(connection, fresh, self.dbname)
            except BaseException:
                self._pool.retire(fresh)
                raise

    def fork(self) -> Database:
        """Return a new database that is a copy of this one; this one must have no other sessions.

        Raises:
            ClusterError: other sessions are connected; the error lists them.
        """
        return Database(self.works, self._copy("fork"), self._pool)

    def close(self) -> None:
        """Give the database and its snapshots back, to be dropped in the background.

        A database that is provably unmodified is handed out again.
        """
        if not self._open:
            return
        self.leave()
        self._pool.retire(self.dbname, self._again if self._clones is not None else None)
        for snapshot in self._snapshots:
            self._pool.retire(snapshot.dbname)

    def leave(self) -> None:
        """Close the handle and its connections; the database remains until its server stops."""
        self._open = False
        self._close_warm()
        self._disconnect()

    @property
    def closed(self) -> bool:
        """Whether the database was given back."""
        return not self._open

    def _again(self, dbname: str) -> str | None:
        assert self._clones is not None
        return self._clones.again(dbname, self.works.server.data_dir, self._since)

    def _close_warm(self) -> None:
        """Close the warm connection if it was not used, and stop opening further ones."""
        warm, self._warm = self._warm, None
        if warm is not None:
            warm.connection.close()
            if self._clones is not None:
                self._clones.warm = None

    def _disconnect(self) -> None:
        """Close the connections that `connect` and `aconnect` have opened."""
        for connection in self.connections:
            # As close() does; AsyncConnection.close() would need an event loop.
            connection.pgconn.finish()
        self.connections.clear()

    def _check_open(self) -> None:
        if not self._open:
            raise ClusterError(f"{self.dbname} is closed", remedy="claim another")

    def _copy(self, prefix: str) -> str:
        self._check_open()
        self._close_warm()
        name = unique_name(prefix)
        with self.works.admins.connection() as connection:
            try:
                admin_sql.clone(connection, name, self.dbname, self.works.server.user)
            except errors.ObjectInUse as error:
                raise in_use(connection, self.dbname) from error
        return name

    def _private(self) -> ConnectionInfo:
        self._close_warm()
        self.was_shown = True
        return self.works.admins.info_of(self.dbname)

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
        return f"<Database {redact(self._info.uri)}>"
