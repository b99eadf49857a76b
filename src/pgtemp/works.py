"""A server for many databases, with pgtemp's administrative connections and pools."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from pgtemp.allocation.pool import Pool
from pgtemp.pgtempdb import PgTempDB
from pgtemp.sql import admin_sql
from pgtemp.sql.admin_connections import AdminConnections
from pgtemp.sql.warm_connection import WarmConnection, open_warm
from pgtemp.templates.clones import Clones
from pgtemp.uri import ConnectionInfo

# A test connects to its database within this time; the pool makes the next one afterwards.
_PAUSE_SECONDS = 0.004


@dataclass(slots=True)
class Works:
    """A running server for many databases.

    Attributes:
        server: the handle of the server.
        kept: the databases to persist, each with the origin to note (such as a test's name).
        keep_in: the directory to persist them in; it must not exist yet.
        admins: pgtemp's administrative connections.
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
        """Return the connection parameters of a database in the server, with the password."""
        return replace(self.server.info, dbname=dbname)

    def pool_of(self, clones: Clones, ready: int) -> Pool[str]:
        """Return a new pool of databases; it is closed with the server."""
        pool: Pool[str] = Pool(clones, ready=ready, pause=_PAUSE_SECONDS)
        self._pools[pool] = clones
        return pool

    def open_warm(self, dbname: str) -> WarmConnection:
        """Open a warm connection to a database in the server. Raises psycopg's errors."""
        return open_warm(self.info_of(dbname).uri)

    def now(self) -> int:
        """Return the time of the server's filesystem, in nanoseconds since the epoch.

        Python's clock is not used, because tests often set it.
        """
        rundir = self.server.data_dir.parent
        os.utime(rundir)
        return rundir.stat().st_mtime_ns

    def stop(self) -> None:
        """Stop the server; threads that still make or drop databases in it fail at once.

        Raises:
            PgTempError: databases could not be persisted; the server is stopped anyway.
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
