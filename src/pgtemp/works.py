"""A server for many databases, and pgtemp's own ways into it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from pgtemp.allocation.pool import Pool
from pgtemp.pgtempdb import PgTempDB
from pgtemp.sql import admin_connections, admin_sql
from pgtemp.sql.admin_connections import AdminConnections, WarmConnection
from pgtemp.templates.clones import Clones
from pgtemp.uri import ConnectionInfo

# In which a test that has got a database connects to it.
_PAUSE_SECONDS = 0.004


@dataclass(slots=True)
class Works:
    """A server that runs, for many databases.

    Attributes:
        kept: databases that are to outlive it, with what they are of.
        keep_in: where they go; a directory that is not there yet.
    """

    server: PgTempDB
    kept: dict[str, str] = field(init=False, default_factory=dict)
    keep_in: Path | None = field(init=False, default=None)
    admins: AdminConnections = field(init=False)
    _pools: dict[Pool[str], Clones] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        server = self.server
        self.admins = AdminConnections(
            ConnectionInfo(
                host=str(server.socket_dir),
                port=server.port,
                user=server.user,
                dbname=admin_sql.MAINTENANCE,
            ),
            server.check,
        )

    def info_of(self, dbname: str) -> ConnectionInfo:
        """How to reach a database in it, with the password."""
        return replace(self.server.info, dbname=dbname)

    def pool_of(self, clones: Clones, ready: int) -> Pool[str]:
        """A pool of databases, which ends with the server."""
        pool: Pool[str] = Pool(clones, ready=ready, pause=_PAUSE_SECONDS)
        self._pools[pool] = clones
        return pool

    def open_warm(self, dbname: str) -> WarmConnection:
        """A connection to a database in it, as its user would open it. Raises psycopg's errors."""
        return admin_connections.open_warm(self.info_of(dbname).uri)

    def now(self) -> int:
        """The time of the server's files, in nanoseconds since the epoch.

        From the filesystem, since tests like to set Python's clock.
        """
        home = self.server.data_dir.parent
        os.utime(home)
        return home.stat().st_mtime_ns

    def stop(self) -> None:
        """End the server; whoever still makes or drops databases in it finds out at once.

        Raises:
            PgTempError: what was to be kept could not be; the server is ended all the same.
        """
        try:
            if self.kept and self.keep_in is not None:
                for pool, clones in self._pools.items():
                    pool.close()
                    clones.settle()
                self.server.store(self.keep_in, self.kept)
        finally:
            self._stop()

    def _stop(self) -> None:
        self.admins.closing.set()
        for pool in self._pools:
            pool.refuse()
        try:
            self.server.stop()
        finally:
            for pool, clones in self._pools.items():
                pool.close(dispose=False)
                clones.close()
            self.admins.close()
