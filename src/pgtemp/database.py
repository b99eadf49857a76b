"""A private database for a test: one clone, with a URL."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import psycopg

from pgtemp import libpq
from pgtemp.allocation.pool import Pool
from pgtemp.allocation.shared_server import SharedServer
from pgtemp.errors import ClusterError
from pgtemp.options.server import StrPath
from pgtemp.pgtempdb import PgTempDB
from pgtemp.sql import dump_restore, server_setup
from pgtemp.uri import ConnectionInfo, redact


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of a database at one point in time; created by `Database.snapshot`."""

    name: str
    dbname: str


class Database:
    """One clone, with a URL. It is returned to the pool by `close()` or at the end of `with`."""

    def __init__(
        self,
        server: PgTempDB,
        shared: SharedServer,
        pool: Pool[str],
        dbname: str,
        *,
        is_clone: bool = True,
    ) -> None:
        """Use `Template.database` or `Cluster.database` to create databases.

        Args:
            server: the handle of the server that contains the database.
            shared: the same server.
            pool: the pool to which the database is returned.
            is_clone: whether it is a clone of the server's template; False for a copy of a clone.
        """
        self.shared = shared
        self._server = server
        self._pool = pool
        self._is_clone = is_clone
        self._since = shared.now()
        self._open = True
        self._snapshots: list[Snapshot] = []
        self.connections: list[psycopg.Connection[Any] | psycopg.AsyncConnection[Any]] = []
        self._warm = shared.take_warm(dbname)
        if self._warm is not None:
            self.connections.append(self._warm.connection)
        self._info = replace(server.info, dbname=dbname)
        self.was_shown = False  # whether clients may have connected without `connect`

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
        return self._server

    def connect(self, **kwargs: Any) -> psycopg.Connection[Any]:
        """Return a psycopg connection to the database; keyword arguments are psycopg's.

        The connection is closed with the database, if not before.
        """
        warm, self._warm = self._warm, None
        if not kwargs:
            if warm is not None and warm.is_usable():
                return warm.connection
            if self._is_clone:  # open warm connections to the next clones
                self.shared.open_warm(self._info)
        if warm is not None:
            warm.connection.close()
        connection = libpq.connect(psycopg.Connection, self._info, kwargs)
        self.connections.append(connection)
        return connection

    async def aconnect(self, **kwargs: Any) -> psycopg.AsyncConnection[Any]:
        """Return an asynchronous psycopg connection; see `connect`."""
        self._close_warm()
        connection = await libpq.aconnect(psycopg.AsyncConnection, self._info, kwargs)
        self.connections.append(connection)
        return connection

    def psql(self, command: str | None = None) -> str:
        r"""Return the output of psql for a command: SQL, or a command of psql such as `\d`.

        Without a command, psql runs on the terminal until it exits, and the result is "".

        Raises:
            TransferError: the command failed, or there is no terminal.
        """
        programs = self._server.installation
        if command is not None:
            return dump_restore.psql(programs, self._private(), command)
        dump_restore.psql_on_terminal(programs, self._private())
        return ""

    def dump(self, path: StrPath) -> None:
        """Dump the database as SQL. Raises TransferError."""
        dump_restore.dump(self._server.installation, self._private(), path)

    def load(self, path: StrPath) -> None:
        """Load a dump, completely or not at all. Raises TransferError."""
        dump_restore.load(self._server.installation, self._private(), path)

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
        self.shared.replace(self.dbname, snapshot.dbname)

    def fork(self) -> Database:
        """Return a new database that is a copy of this one, which must have no other sessions.

        Raises:
            ClusterError: other sessions are connected; the error lists them.
        """
        copy = self._copy("fork")
        return Database(self._server, self.shared, self._pool, copy, is_clone=False)

    def close(self) -> None:
        """Return the database and its snapshots to the pool, which drops them in the background.

        A database that is provably unmodified is handed out again.
        """
        if not self._open:
            return
        self.leave()
        self._pool.retire(self.dbname, self._reuse if self._is_clone else None)
        for snapshot in self._snapshots:
            self._pool.retire(snapshot.dbname)

    def leave(self) -> None:
        """Close the handle and its connections; the database remains until its server stops."""
        self._open = False
        self._close_warm()
        self._disconnect()

    @property
    def closed(self) -> bool:
        """Whether the database was returned to the pool."""
        return not self._open

    def _reuse(self, dbname: str) -> str | None:
        return self.shared.reuse(dbname, self._since)

    def _close_warm(self) -> None:
        """Close the warm connection if it was not used, and stop opening further ones."""
        warm, self._warm = self._warm, None
        if warm is not None:
            warm.connection.close()
            if self._is_clone:
                self.shared.open_warm(None)

    def _disconnect(self) -> None:
        """Close the connections that `connect` and `aconnect` have opened."""
        for connection in self.connections:
            # close() does the same; AsyncConnection.close() would need an event loop.
            connection.pgconn.finish()
        self.connections.clear()

    def _check_open(self) -> None:
        if not self._open:
            raise ClusterError(f"{self.dbname} is closed", remedy="claim another database")

    def _copy(self, prefix: str) -> str:
        self._check_open()
        self._close_warm()
        return self.shared.copy(self.dbname, prefix)

    def _private(self) -> ConnectionInfo:
        self._close_warm()
        self.was_shown = True
        postmaster = self.shared.postmaster
        return server_setup.private_info(postmaster, self._info.user, self.dbname)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Database {redact(self._info.uri)}>"
