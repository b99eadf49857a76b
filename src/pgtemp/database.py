"""A database of one's own: one clone, with a URL."""

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
    """A database as it was at some moment; made by `Database.snapshot`."""

    name: str
    dbname: str


class Database:
    """One clone, with a URL. Given back with `close()` or at the end of `with`."""

    def __init__(
        self, works: Works, dbname: str, pool: Pool[str], clones: Clones | None = None
    ) -> None:
        """Made by templates.

        Args:
            clones: whose clone it is, where it comes from those kept ready.
        """
        self.works = works
        self._pool = pool
        self._clones = clones
        self._since = works.now()
        self._open = True
        self._snapshots: list[Snapshot] = []
        self.connections: list[psycopg.Connection[Any] | psycopg.AsyncConnection[Any]] = []
        self._ahead = clones.opened(dbname) if clones is not None else None
        if self._ahead is not None:
            self.connections.append(self._ahead.connection)
        self._info = works.info_of(dbname)
        self.was_shown = False  # whether anybody can have come but by `connect`

    @property
    def info(self) -> ConnectionInfo:
        """Host, port, user, password and database in one value."""
        self._forget_ahead()  # whoever takes it may want to be alone
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
        """The server it is in, with its directory, log and pid."""
        self.was_shown = True
        return self.works.server

    def connect(self, **kwargs: Any) -> psycopg.Connection[Any]:
        """A psycopg connection to the database; keyword arguments are psycopg's.

        It is closed with the database at the latest.
        """
        ahead, self._ahead = self._ahead, None
        if not kwargs:
            if ahead is not None and ahead.is_usable():
                return ahead.connection
            if self._clones is not None:  # those that come after this one get theirs ahead
                self._clones.ahead = self.works.open_warm
        if ahead is not None:
            ahead.connection.close()
        connection = psycopg.connect(self._info.uri, **kwargs)
        self.connections.append(connection)
        return connection

    async def aconnect(self, **kwargs: Any) -> psycopg.AsyncConnection[Any]:
        """As `connect`, for asyncio."""
        self._forget_ahead()
        connection = await psycopg.AsyncConnection.connect(self._info.uri, **kwargs)
        self.connections.append(connection)
        return connection

    def psql(self, command: str | None = None) -> str:
        r"""What psql prints for a command, SQL or its own such as `\\d`.

        Without one, psql is run on the terminal until you leave it, and nothing is returned.

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
        """Load a dump, all of it or nothing. Raises TransferError."""
        dump_restore.load(self.works.server.installation, self._private(), path)

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
        self._forget_ahead()
        works, fresh = self.works, unique_name("restored")
        with works.admins.connection() as connection:
            # The old one goes only when the new one is there.
            admin_sql.clone(connection, fresh, snapshot.dbname, works.server.user)
            try:
                admin_sql.drop(connection, self.dbname, works.admins.info_of(self.dbname))
                admin_sql.rename(connection, fresh, self.dbname)
            except BaseException:
                self._pool.retire(fresh)
                raise

    def fork(self) -> Database:
        """Another database that begins as this one is now; nobody else may be connected to it.

        Raises:
            ClusterError: somebody is; says who.
        """
        return Database(self.works, self._copy("fork"), self._pool)

    def close(self) -> None:
        """Give the database and its snapshots back, to be dropped behind the caller's back.

        One that is proved to be what it was when it was claimed is handed out again.
        """
        if not self._open:
            return
        self.leave()
        self._pool.retire(self.dbname, self._again if self._clones is not None else None)
        for snapshot in self._snapshots:
            self._pool.retire(snapshot.dbname)

    def leave(self) -> None:
        """Let go of the database, which stays as it is until its server ends."""
        self._open = False
        self._forget_ahead()
        self._disconnect()

    @property
    def closed(self) -> bool:
        """Whether it was given back."""
        return not self._open

    def _again(self, dbname: str) -> str | None:
        assert self._clones is not None
        return self._clones.again(dbname, self.works.server.data_dir, self._since)

    def _forget_ahead(self) -> None:
        """Close the connection that was opened ahead; where nobody wants any, open no more."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.connection.close()
            if self._clones is not None:
                self._clones.ahead = None

    def _disconnect(self) -> None:
        """Close what `connect` and `aconnect` have opened."""
        for connection in self.connections:
            connection.pgconn.finish()  # as `close` does, which of the two needs an event loop
        self.connections.clear()

    def _check_open(self) -> None:
        if not self._open:
            raise ClusterError(f"{self.dbname} is closed", remedy="claim another")

    def _copy(self, prefix: str) -> str:
        self._check_open()
        self._forget_ahead()
        name = unique_name(prefix)
        with self.works.admins.connection() as connection:
            try:
                admin_sql.clone(connection, name, self.dbname, self.works.server.user)
            except errors.ObjectInUse as error:
                raise in_use(connection, self.dbname) from error
        return name

    def _private(self) -> ConnectionInfo:
        self._forget_ahead()
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
