"""Templates: sealed databases that databases are cloned from, built once.

A build works on a database with a name of its own and gets its final name last, so that a template
that can be found is whole; one that fails leaves nothing, and everybody who waited gets its error.
Before it is sealed it is connected to once: a clone then comes with its relation cache, and the
first connection to it takes 3 ms instead of 5.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psycopg
from psycopg import errors

from pgtemp.errors import ClusterError, DiskFullError, OptionError, PgTempError
from pgtemp.host import disk_space
from pgtemp.host.progress import step
from pgtemp.programs.installation import Installation
from pgtemp.sql import admin_connections, admin_sql
from pgtemp.sql.admin_connections import AdminConnections, Connection, WarmConnection, was_lost
from pgtemp.templates.recipe import Recipe
from pgtemp.templates.recycle import Reuse
from pgtemp.templates.unmodified import untouched
from pgtemp.uri import ConnectionInfo

_log = logging.getLogger("pgtemp")


class Clones:
    """What a pool needs to know of the clones of one template.

    Attributes:
        ahead: opens a connection to a clone before anybody asks; None opens none.
    """

    def __init__(self, admins: AdminConnections, source: str, owner: str, prefix: str) -> None:
        self._admins, self._source, self._owner, self._prefix = admins, source, owner, prefix
        # Of the source, which is sealed, so that they stay.
        self._attributes: bool | None = None
        self._size = 0
        self._reuse = Reuse(admins, source, owner)
        self.ahead: Callable[[str], WarmConnection] | None = None
        self._opened: dict[str, WarmConnection] = {}

    @property
    def recycles(self) -> bool:
        """Whether a database that was dropped makes the next one cheaper."""
        return self._reuse.works

    def provision(self) -> str:
        """A new database; its name."""
        name = unique_name(self._prefix)
        self.make(name)
        if (ahead := self.ahead) is not None:
            with suppress(psycopg.Error):  # whoever connects will hear it
                self._opened[name] = ahead(name)
        return name

    def opened(self, name: str) -> WarmConnection | None:
        """The connection that was opened ahead to a clone, for whoever asks first."""
        return self._opened.pop(name, None)

    def make(self, name: str) -> None:
        """A new database of that name.

        Raises:
            ClusterError: it could not be made; a DiskFullError where there is no room.
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

    def _clone(self, connection: Connection, name: str, attributes: bool) -> None:
        try:
            admin_sql.clone(
                connection, name, self._source, self._owner, self._admins.closing,
                attributes=attributes, size=self._size,
            )  # fmt: skip
        except errors.ObjectInUse as error:
            raise in_use(connection, self._source) from error

    def owns(self, name: str) -> bool:
        """Whether a database of this name is one that making and dropping clones takes."""
        return self._reuse.owns(name)

    def settle(self) -> None:
        """Leave nothing in the server but the template and its clones: its data is kept."""
        with self._admins.connection() as connection:
            self._reuse.end(connection)

    def close(self) -> None:
        """Close the connections that nobody has asked for; nothing more is made."""
        while self._opened:
            self._opened.popitem()[1].connection.close()
        self._reuse.close()

    def dispose(self, name: str) -> None:
        if (unused := self.opened(name)) is not None:
            unused.connection.close()
        self._do(
            lambda connection: self._reuse.dispose(
                connection, name, attributes=bool(self._attributes), size=self._size
            )
        )

    def again(self, name: str, data_dir: Path, since: int) -> str | None:
        """A clone that is proved to be what it was (see unmodified.py), under another name.

        Under the old one somebody might still come, late.
        """
        with self._admins.connection() as connection:
            if not untouched(
                connection, data_dir, name, source=self._source, owner=self._owner, since=since
            ):
                return None
            fresh = unique_name(self._prefix)
            admin_sql.rename(connection, name, fresh)
            return fresh

    def _do(self, work: Callable[[Connection], None]) -> None:
        """Do it once more where our connection was ended, as all were that somebody found.

        Or with all of the server, which has crashed and comes back.
        """
        try:
            with self._admins.connection() as connection:
                work(connection)
        except ClusterError as error:
            if not _was_ended(error.__cause__) or self._admins.closing.is_set():
                raise
            with self._admins.connection() as connection:
                work(connection)

    def usable(self, name: str) -> bool:
        return True


def _was_ended(error: BaseException | None) -> bool:
    # Or the connection broke before the server could say anything.
    return isinstance(error, errors.AdminShutdown | errors.CrashShutdown) or was_lost(error)


def build(
    admins: AdminConnections,
    programs: Installation,
    recipe: Recipe,
    *,
    name: str,
    source: str,
    info: ConnectionInfo,
) -> str:
    """Build a template in a cluster that runs; the name of its sealed database.

    Args:
        source: the database to begin with.
        info: how a build reaches the cluster; its user owns the database.

    Raises:
        PgTempError: the build failed; nothing of it is left. A callable's own error comes as it is.
    """
    fresh, final = unique_name(f"building_{name}"), unique_name(f"template_{name}")
    there = admins.info_of(fresh)
    with step(f"building template {name}"):
        with admins.connection() as connection:
            admin_sql.clone(connection, fresh, source, info.user, admins.closing)
        try:
            recipe.apply(programs, there, replace(info, dbname=fresh))
            with admin_connections.connected(there) as inside:
                inside.execute("SELECT 1")
            with admins.connection() as connection:
                admin_sql.seal(connection, fresh, final, there)
        except BaseException:
            _discard(admins, fresh)
            raise
    return final


def _discard(admins: AdminConnections, dbname: str) -> None:
    """Drop what a failed build left; its error says more than ours would."""
    try:
        with admins.connection() as connection:
            admin_sql.unseal(connection, dbname)
            admin_sql.drop(connection, dbname, admins.info_of(dbname))
    except PgTempError as error:
        _log.warning("what a failed build left could not be dropped: %s", error)


def check_name(name: str) -> None:
    """Raise OptionError for what cannot name a template."""
    if not name or "\0" in name or name.encode(errors="replace") != name.encode(errors="ignore"):
        raise OptionError(f"{name!r} cannot name a template", remedy="give it a name of letters")


def unique_name(prefix: str) -> str:
    """A database name that nobody has; PostgreSQL's limit is 63 bytes."""
    return f"{prefix.encode()[:50].decode(errors='ignore')}_{secrets.token_hex(4)}"


def in_use(connection: Connection, dbname: str) -> PgTempError:
    """The error for a database that cannot be copied because somebody is in it."""
    who = admin_sql.sessions_in(connection, dbname)
    return ClusterError(
        f"{dbname} cannot be copied while others are connected to it",
        remedy="close their connections first",
        details=who,
    )
