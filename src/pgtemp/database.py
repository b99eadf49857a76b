"""A database of one's own: one clone, with a URL."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg import errors

from pgtemp.databases import admin, transfer
from pgtemp.databases.admin import Admins
from pgtemp.databases.pool import Pool
from pgtemp.databases.template import in_use, unique_name
from pgtemp.errors import ClusterError
from pgtemp.options import StrPath
from pgtemp.pgtempdb import PgTempDB
from pgtemp.uri import ConnectionInfo, redact


@dataclass(slots=True)
class Works:
    """A server that runs, for many databases, and pgtemp's own ways into it."""

    server: PgTempDB
    admins: Admins = field(init=False)
    pools: list[Pool[str]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        server = self.server
        self.admins = Admins(
            ConnectionInfo(
                host=str(server.socket_dir),
                port=server.port,
                user=server.user,
                dbname=admin.MAINTENANCE,
            )
        )

    def info_of(self, dbname: str) -> ConnectionInfo:
        """How to reach a database in it, with the password."""
        return replace(self.server.info, dbname=dbname)

    def stop(self) -> None:
        """End the server; whoever still makes or drops databases in it finds out at once."""
        self.admins.closing.set()
        for pool in self.pools:
            pool.refuse()
        try:
            self.server.stop()
        finally:
            for pool in self.pools:
                pool.close(dispose=False)
            self.admins.close()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A database as it was at some moment; made by `Database.snapshot`."""

    name: str
    dbname: str


class Database:
    """One clone, with a URL. Given back with `close()` or at the end of `with`."""

    def __init__(self, works: Works, dbname: str, pool: Pool[str]) -> None:
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
        transfer.dump(self._works.server.installation, self._private(), path)

    def load(self, path: StrPath) -> None:
        """Load a dump, all of it or nothing. Raises TransferError."""
        transfer.load(self._works.server.installation, self._private(), path)

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
            admin.clone(connection, fresh, snapshot.dbname, works.server.user)
            try:
                admin.drop(connection, self.dbname, works.admins.elsewhere(self.dbname))
                admin.rename(connection, fresh, self.dbname)
            except BaseException:
                self._pool.retire(fresh)
                raise

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
                admin.clone(connection, name, self.dbname, self._works.server.user)
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
