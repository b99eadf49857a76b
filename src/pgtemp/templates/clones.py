"""The clones of a template: databases that are copied from a sealed database.

The template contains a relation cache, because pgtemp connected to it before it was sealed; the
first connection to a clone then takes 3 ms instead of 5.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import LiteralString

import psycopg
from psycopg import errors

from pgtemp.errors import ClusterError, DiskFullError, OptionError, PgTempError
from pgtemp.host import disk_space
from pgtemp.sql import admin_sql
from pgtemp.sql.admin_connections import AdminConnections
from pgtemp.sql.connection import Connection, was_lost
from pgtemp.sql.warm_connection import WarmConnection, open_warm
from pgtemp.templates.recycle import Reuse
from pgtemp.templates.unmodified_check import is_unmodified
from pgtemp.uri import ConnectionInfo


class Clones:
    """Creates and drops the clones of one template.

    Attributes:
        clients: the parameters of clients' connections, except the database; `make` then opens a
            warm connection. None disables this.
    """

    def __init__(self, admins: AdminConnections, source: str, owner: str) -> None:
        self._admins, self._source, self._owner = admins, source, owner
        # Properties of the source, which do not change, because it is sealed; None if not yet
        # known.
        self._attributes: bool | None = None
        self._size = 0
        self._reuse = Reuse(admins, source, owner)
        self.clients: ConnectionInfo | None = None
        self._warm_connections: dict[str, WarmConnection] = {}

    @property
    def recycles(self) -> bool:
        """Whether dropped databases are recycled, which makes the next clone cheaper."""
        return self._reuse.works

    def take_warm(self, name: str) -> WarmConnection | None:
        """Return the warm connection to a clone, if there is one; the caller then owns it."""
        return self._warm_connections.pop(name, None)

    def make(self, name: str) -> None:
        """Create a clone of that name.

        Raises:
            ClusterError: the clone could not be created; a DiskFullError if the disk is full.
        """

        def clone(connection: Connection) -> None:
            if self._attributes is None:
                self._attributes = admin_sql.has_attributes(connection, self._source)
                self._size = admin_sql.size_of(connection, self._source)
                disk_space.put_aside(connection.home)
            if self._reuse.make(connection, name, attributes=self._attributes):
                return
            try:
                self._clone(connection, name, self._attributes)
            except DiskFullError:
                if not self._reuse.end(connection):
                    raise
                self._clone(connection, name, self._attributes)

        self._do(clone)
        if (clients := self.clients) is not None:
            with suppress(psycopg.Error):  # the client gets the error when it connects
                self._warm_connections[name] = open_warm(replace(clients, dbname=name))

    def _clone(self, connection: Connection, name: str, attributes: bool) -> None:
        try:
            admin_sql.clone(
                connection, name, self._source, self._owner, self._admins.closing,
                attributes=attributes, size=self._size,
            )  # fmt: skip
        except errors.ObjectInUse as error:
            raise in_use(connection, self._source) from error

    def owns(self, name: str) -> bool:
        """Return whether a database of this name is a temporary database of the recycling."""
        return self._reuse.owns(name)

    def settle(self) -> None:
        """Remove everything from the server except the template and its clones.

        Called before the server's data is persisted.
        """
        with self._admins.connection() as connection:
            self._reuse.end(connection)

    def close(self) -> None:
        """Close the unused warm connections; no further clones are made."""
        while self._warm_connections:
            self._warm_connections.popitem()[1].connection.close()
        self._reuse.close()

    def dispose(self, name: str) -> None:
        """Drop a clone, and close its warm connection if it was not used."""
        if (unused := self.take_warm(name)) is not None:
            unused.connection.close()
        self._do(lambda connection: self._reuse.dispose(connection, name, size=self._size))

    def reuse(
        self, name: str, fresh: str, data_dir: Path, since: int, schema: LiteralString
    ) -> bool:
        """Rename a clone to `fresh` if it is provably unmodified; return whether it is.

        Args:
            since: when the clone was handed out, in nanoseconds since the epoch.
            schema: see `is_unmodified`.
        """
        with self._admins.connection() as connection:
            unmodified = is_unmodified(
                connection, data_dir, name, source=self._source, owner=self._owner, since=since,
                schema=schema,
            )  # fmt: skip
            if unmodified:
                admin_sql.rename(connection, name, fresh)
            return unmodified

    def _do(self, work: Callable[[Connection], None]) -> None:
        """Execute `work` with a connection; repeat it once if the connection is terminated.

        A test may have terminated all backends of the server, or the server may have crashed and be
        restarting.
        """
        try:
            with self._admins.connection() as connection:
                work(connection)
        except ClusterError as error:
            if not _was_terminated(error.__cause__) or self._admins.closing.is_set():
                raise
            with self._admins.connection() as connection:
                work(connection)


def _was_terminated(error: BaseException | None) -> bool:
    # `was_lost`: the connection broke before the server could send an error.
    return isinstance(error, errors.AdminShutdown | errors.CrashShutdown) or was_lost(error)


def check_name(name: str) -> None:
    """Raise OptionError if a template cannot have this name."""
    if not name or "\0" in name or name.encode(errors="replace") != name.encode(errors="ignore"):
        raise OptionError(
            f"{name!r} is not a valid template name", remedy="choose a name of letters"
        )


def unique_name(prefix: str) -> str:
    """Return an unused database name; PostgreSQL's limit is 63 bytes."""
    return f"{prefix.encode()[:50].decode(errors='ignore')}_{secrets.token_hex(4)}"


def in_use(connection: Connection, dbname: str) -> PgTempError:
    """Return the error for a database that cannot be copied because it has other sessions."""
    return ClusterError(
        f"{dbname} cannot be copied while other sessions are connected to it",
        remedy="close their connections first",
        details=admin_sql.sessions_in(connection, dbname),
    )
