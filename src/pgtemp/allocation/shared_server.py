"""A running server with many databases: for the leases of the daemon, or the tests of a program."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import AbstractContextManager, suppress

from psycopg import errors

from pgtemp.allocation.leaks import LeakCheck
from pgtemp.errors import PgTempError
from pgtemp.host import procfs
from pgtemp.server.postmaster import Postmaster
from pgtemp.sql import admin_sql, server_setup, statement_logging
from pgtemp.sql.admin_connections import AdminConnections, Connection, WarmConnection
from pgtemp.sql.server_setup import Plan
from pgtemp.templates.clones import Clones, in_use, unique_name
from pgtemp.uri import ConnectionInfo

_log = logging.getLogger("pgtemp")
_SHORT_SECONDS = 2.0  # for a query whose answer only improves an error message


def printable(text: str) -> str:
    """Return a text for the log on a single line, even if a client put control characters in it."""
    return text if text.isprintable() else ascii(text)


def alive(postmaster: Postmaster) -> bool:
    """Return whether a server runs and is not stopped (SIGSTOP); log a warning if not."""
    try:
        postmaster.check()
    except PgTempError as error:
        _log.warning("%s", error)
        return False
    if procfs.is_stopped(postmaster.pid):
        _log.warning("PostgreSQL (pid %d) is stopped (SIGSTOP)", postmaster.pid)
        return False
    return True


class SharedServer:
    """A server with a sealed template, and the databases that are cloned from it.

    The library and the daemon both use it; they differ in how long a database is in use. A pool
    calls `provision` and `dispose`.

    Attributes:
        names: the names of its databases, from before they are made until after they are dropped.
        occupied: the names of the databases that leases have.
        persisted: the names of the databases that remain when the server stops.
        watched: whether settings of the server log or report every statement.
        epoch: counts changes of settings that apply at login; a connection that was opened in an
            earlier epoch is outdated.
    """

    def __init__(self, postmaster: Postmaster, plan: Plan, prefix: str) -> None:
        """Use a running server.

        Args:
            plan: the plan of the server; without a template, the databases are empty.
            prefix: the beginning of the names of the databases.
        """
        self.postmaster = postmaster
        self._plan = plan
        self._prefix = prefix
        self.names: set[str] = set()
        self.occupied: set[str] = set()
        self.persisted: set[str] = set()
        self.watched = False
        self.epoch = 0
        self._stale = False
        self._checking = threading.Lock()
        self._roles = plan.users
        to = server_setup.private_info(postmaster, plan.superuser, admin_sql.MAINTENANCE)
        self._admins = AdminConnections(to, postmaster.check)
        self._clones = Clones(self._admins, plan.template or admin_sql.BASE, plan.options.user)
        self._leaks = LeakCheck(postmaster.data_dir, self._owns)

    @classmethod
    def start(cls, plan: Plan, prefix: str) -> SharedServer:
        """Start a server for leases, whose leaks are detected. Raises PgTempError."""
        postmaster = server_setup.start(plan, None)
        try:
            self = cls(postmaster, plan, prefix)
            with self._admins.connection() as connection:
                if not plan.options.persist:
                    # Clients must not change template1.
                    admin_sql.forbid_connections(connection, admin_sql.BASE)
                self._leaks.accept(connection)
                self.watched = statement_logging.is_watched(connection)
        except BaseException:
            server_setup.discard(postmaster)
            raise
        return self

    @property
    def recycles(self) -> bool:
        """Whether dropped databases are recycled, which makes the next clone cheaper."""
        return not self._stale and self._clones.recycles

    def _owns(self, name: str) -> bool:
        return name in self.names or name in self.persisted or self._clones.owns(name)

    @property
    def answers(self) -> bool:
        """Whether it runs and has answered all statements of pgtemp."""
        if self._admins.unanswered:
            _log.warning("PostgreSQL (pid %d) does not answer", self.postmaster.pid)
            return False
        return alive(self.postmaster)

    @property
    def stale(self) -> bool:
        """Whether its state is no longer clean or known, so that it gets no new leases."""
        return self._stale

    def mark_stale(self) -> None:
        """Mark the server stale. This is final: a concurrent check must not reset it."""
        self._stale = True

    def check(self) -> None:
        """Mark it stale if it does not run or does not answer."""
        if self._stale:
            return
        if not self.answers:
            self.mark_stale()

    def provision(self) -> str:
        """Make a database and return its name. Raises PgTempError; nothing is then left behind."""
        dbname = unique_name(self._prefix)
        self.clone(dbname)
        return dbname

    def clone(self, dbname: str) -> None:
        """Make a database of that name. Raises PgTempError; nothing is then left behind."""
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

        Python's clock is not used, because tests often set it.
        """
        run_dir = self.postmaster.home.path
        os.utime(run_dir)
        return run_dir.stat().st_mtime_ns

    def reuse(self, dbname: str, since: int) -> str | None:
        """Rename a database if it is provably unmodified (see unmodified.py); return its new name.

        It is renamed because a late client might still connect to the old name.

        Args:
            since: when the database was handed out, in nanoseconds since the epoch (see `now`).
        """
        fresh = unique_name(self._prefix)
        self.names.add(fresh)
        try:
            reused = self._clones.reuse(dbname, fresh, self.postmaster.data_dir, since)
        except BaseException:
            self.names.discard(fresh)
            raise
        self.names.discard(dbname if reused else fresh)
        return fresh if reused else None

    def copy(self, dbname: str, prefix: str) -> str:
        """Make a copy of a database that has no other sessions, and return the copy's name.

        Raises:
            ClusterError: it has other sessions; the error lists them.
        """
        name = unique_name(prefix)
        self.names.add(name)
        with self._admins.connection() as connection:
            try:
                admin_sql.clone(connection, name, dbname, self._plan.options.user)
            except errors.ObjectInUse as error:
                raise in_use(connection, dbname) from error
        return name

    def replace(self, dbname: str, source: str) -> None:
        """Replace a database by a copy of another; its sessions are terminated."""
        fresh = self.copy(source, "restored")  # drop the old database only after this succeeded
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
        """From now on, open a warm connection to each new database.

        Args:
            info: how clients connect; None opens no further warm connections.
        """
        self._clones.clients = info

    def persist(self, dbname: str, name: str) -> None:
        """Persist a database under another name; terminate its sessions. Raises PgTempError."""
        self.persisted.add(name)
        with self._admins.connection() as connection:
            admin_sql.disconnect_all(connection, dbname)
            admin_sql.rename(connection, dbname, name)
        self.names.discard(dbname)

    def knows(self, user: str) -> bool:
        """Return whether the user's role is known to exist, so that a superuser can log in."""
        return user in self._roles

    def ensure_role(self, user: str, attributes: str, owns: str | None) -> None:
        """Create the role of a client that gets a lease, unless it exists. Raises PgTempError.

        Args:
            owns: a database that the role shall own; None for none.
        """
        if user not in self._roles:
            with self._checking, self._admins.connection() as connection:
                made = admin_sql.ensure_login(connection, user, attributes, self._plan.secret)
                # A role that a client created is not accepted, so that the leak check finds it.
                if made or self._leaks.knows_role(user):
                    self._leaks.accept_role(connection, user)
            self._roles.add(user)
        if owns is not None:
            with self._admins.connection() as connection:
                admin_sql.set_owner(connection, owns, user)

    def has(self, dbname: str) -> bool:
        """Return whether a database of this name exists. Raises PgTempError."""
        with self._admins.connection() as connection, connection.given(_SHORT_SECONDS):
            return admin_sql.exists(connection, dbname)

    def check_leaks(self, dbname: str) -> None:
        """Find what an ended lease left outside its database, and clean up if possible.

        Leaked roles are dropped if there is no other lease that they could belong to. After any
        other leak the server is stale. An exception means that it is not known what was left.
        """
        with self._checking, self._admins.connection() as connection:
            # A session that is still running could leave more behind.
            admin_sql.disconnect_all(connection, dbname)
            if admin_sql.has_drop_obstacles(connection, dbname):
                self._clones.dispose(dbname)
            if self._leaks.settings_were_touched(connection):
                self.epoch += 1
            found = self._leaks.found(connection)
            if not found:
                return
            names = ", ".join(f"{kind} {printable(name)}".rstrip() for kind, name in found)
            if self.occupied <= {dbname}:
                self._clones.dispose(dbname)  # the leaked roles may own objects in it
                found = self._leaks.clean(connection, found)
            if found:
                self.mark_stale()
            # A dropped role is created again when a client with its name connects.
            self._roles = self._plan.users
        _log.info("a lease left %s: %s", names, "a new server" if found else "cleaned up")

    def abandon(self) -> None:
        """Let the supervisor stop the server; all calls that wait for the server fail."""
        self.mark_stale()
        self.interrupt()
        self.postmaster.abandon()

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

    def stop(self) -> None:
        """Stop the server and remove everything in it, except persisted databases."""
        if self.persisted:
            with suppress(PgTempError):  # if the server has crashed, its data is persisted anyway
                self.settle()
        self.close()
        if self.persisted:
            self.postmaster.stop()
        else:
            server_setup.discard(self.postmaster)
