"""A running server with many databases that are cloned from one template.

The library and the daemon both use it; they differ in how long a database is in use. A pool creates
its databases in advance.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, suppress
from typing import LiteralString

from psycopg import errors

from pgtemp.errors import PgTempError
from pgtemp.server.postmaster import Postmaster
from pgtemp.sql import admin_sql, server_setup
from pgtemp.sql.admin_connections import AdminConnections
from pgtemp.sql.connection import Connection
from pgtemp.sql.server_setup import Plan
from pgtemp.sql.warm_connection import WarmConnection
from pgtemp.templates.clones import Clones, in_use, unique_name
from pgtemp.templates.unmodified_check import SESSION
from pgtemp.uri import ConnectionInfo


class SharedServer:
    """A server with a sealed template, and the databases that are cloned from it.

    Attributes:
        names: the names of its databases, from before they are created until after they are
            dropped.
    """

    _schema: LiteralString = SESSION  # of the function that proves databases unmodified

    def __init__(self, postmaster: Postmaster, plan: Plan, prefix: str) -> None:
        """Use a running server.

        Args:
            plan: the plan of the server; without a template, the databases are empty.
            prefix: the beginning of the names of the databases.
        """
        self.postmaster = postmaster
        self.plan = plan
        self._prefix = prefix
        self.names: set[str] = set()
        to = server_setup.private_info(postmaster, plan.superuser, admin_sql.MAINTENANCE)
        self._admins = AdminConnections(to, postmaster.check)
        self._clones = Clones(self._admins, plan.template or admin_sql.BASE, plan.options.user)

    @property
    def recycles(self) -> bool:
        """Whether dropped databases are recycled, which makes the next clone cheaper."""
        return self._clones.recycles

    def provision(self) -> str:
        """Create a database, return its name. Raises PgTempError; nothing is then left behind."""
        dbname = unique_name(self._prefix)
        self.clone(dbname)
        return dbname

    def clone(self, dbname: str) -> None:
        """Create a database of that name. Raises PgTempError; nothing is then left behind."""
        self.names.add(dbname)
        try:
            self._clones.make(dbname)
        except BaseException:
            self.names.discard(dbname)
            raise

    def dispose(self, dbname: str) -> None:
        """Drop a database, even if it has sessions. Raises PgTempError."""
        try:
            self._clones.dispose(dbname)
        finally:
            self.names.discard(dbname)

    def usable(self, dbname: str) -> bool:
        return True

    def now(self) -> int:
        """Return the time of the server's file system, in nanoseconds since the epoch.

        Python's clock is not used, because tests often change it.
        """
        run_dir = self.postmaster.home.path
        os.utime(run_dir)
        return run_dir.stat().st_mtime_ns

    def reuse(self, dbname: str, since: int) -> str | None:
        """Rename a database if it is provably unmodified; return its new name.

        It is renamed because a late client might still connect to the old name.

        Args:
            since: when the database was handed out, in nanoseconds since the epoch (see `now`).
        """
        fresh = unique_name(self._prefix)
        self.names.add(fresh)
        try:
            reused = self._clones.reuse(
                dbname, fresh, self.postmaster.data_dir, since, self._schema
            )
        except BaseException:
            self.names.discard(fresh)
            raise
        self.names.discard(dbname if reused else fresh)
        return fresh if reused else None

    def copy(self, dbname: str, prefix: str) -> str:
        """Copy a database that has no other sessions, and return the name of the copy.

        Raises:
            ClusterError: it has other sessions; the error lists them.
        """
        name = unique_name(prefix)
        self.names.add(name)
        with self._admins.connection() as connection:
            try:
                admin_sql.clone(connection, name, dbname, self.plan.options.user)
            except errors.ObjectInUse as error:
                raise in_use(connection, dbname) from error
        return name

    def replace(self, dbname: str, source: str) -> None:
        """Replace a database with a copy of another one; its sessions are terminated."""
        fresh = self.copy(source, "restored")  # drop the old database only after this has succeeded
        try:
            with self._admins.connection() as connection:
                admin_sql.drop(connection, dbname, self._admins.info_of(dbname))
                admin_sql.rename(connection, fresh, dbname)
        except BaseException:
            with suppress(PgTempError):
                self.dispose(fresh)
            raise
        self.names.discard(fresh)

    def connection(self) -> AbstractContextManager[Connection]:
        """Return an administrative connection for a `with` block."""
        return self._admins.connection()

    def take_warm(self, dbname: str) -> WarmConnection | None:
        """Return the warm connection to a database, if there is one; the caller then owns it."""
        return self._clones.take_warm(dbname)

    def open_warm(self, info: ConnectionInfo | None) -> None:
        """Open a warm connection to each database that is created from now on.

        Args:
            info: the parameters of clients' connections; None opens no further warm connections.
        """
        self._clones.clients = info

    def interrupt(self) -> None:
        """Make all calls that wait for the server fail, because it is about to stop."""
        self._admins.closing.set()

    def settle(self) -> None:
        """Remove everything except the template and the databases, before data is persisted."""
        self._clones.settle()

    def close(self) -> None:
        """Close pgtemp's connections to the server."""
        self._admins.close()
        self._clones.close()
