"""A shared server of the daemon, in which each database is for one lease."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from typing import LiteralString

from pgtemp.allocation.leaks import LeakCheck
from pgtemp.allocation.shared_server import SharedServer
from pgtemp.errors import PgTempError
from pgtemp.host import procfs
from pgtemp.server.postmaster import Postmaster
from pgtemp.sql import admin_sql, server_setup, statement_logging
from pgtemp.sql.server_setup import Plan
from pgtemp.templates import unmodified_check

_log = logging.getLogger("pgtemp")
_PREFIX = "lease"  # of the names of databases
_NAMED = 10  # leaks in a message
_SHORT_SECONDS = 2.0  # for a query whose answer only improves an error message


def printable(text: str) -> str:
    """Return a text as a single line for the log; control characters of a client are escaped."""
    return text if text.isprintable() else ascii(text)


def alive(postmaster: Postmaster) -> bool:
    """Return whether a server is running and not stopped (SIGSTOP); if it is not, log a warning."""
    try:
        postmaster.check()
    except PgTempError as error:
        _log.warning("%s", error)
        return False
    if procfs.is_stopped(postmaster.pid):
        _log.warning("PostgreSQL (pid %d) is stopped (SIGSTOP)", postmaster.pid)
        return False
    return True


class LeasedServer(SharedServer):
    """A shared server that is replaced when a lease leaves something outside its database.

    Attributes:
        occupied: the names of the databases that leases have.
        persisted: the names of the databases that remain when the server stops.
        watched: whether settings of the server log or report every statement.
        epoch: counts changes of settings that apply at login; a connection that was opened in an
            earlier epoch is outdated.
    """

    _schema: LiteralString = "pgtemp"

    def __init__(self, plan: Plan) -> None:
        """Start the server. Raises PgTempError."""
        postmaster = server_setup.start(plan, None)
        try:
            super().__init__(postmaster, plan, _PREFIX)
            self.occupied: set[str] = set()
            self.persisted: set[str] = set()
            self.epoch = 0
            self._stale = False
            self._checking = threading.Lock()
            self._roles = plan.users
            self._leaks = LeakCheck(
                postmaster.data_dir, self._owns, plan.template or admin_sql.BASE
            )
            with self.connection() as connection:
                if not plan.options.persist:
                    # Clients must not change template1.
                    admin_sql.forbid_connections(connection, admin_sql.BASE)
                # The leak check would find functions that are created later.
                unmodified_check.declare(connection, self._schema)
                self._leaks.accept(connection)
                self.watched = statement_logging.is_watched(connection)
        except BaseException:
            server_setup.discard(postmaster)
            raise

    @property
    def recycles(self) -> bool:
        return not self._stale and super().recycles

    def _owns(self, name: str) -> bool:
        return name in self.names or name in self.persisted or self._clones.owns(name)

    @property
    def answers(self) -> bool:
        """Whether it is running and has answered all statements of pgtemp."""
        if self._admins.unanswered:
            _log.warning("PostgreSQL (pid %d) does not answer", self.postmaster.pid)
            return False
        return alive(self.postmaster)

    @property
    def stale(self) -> bool:
        """Whether its state is no longer known to be clean, so that it gets no new leases."""
        return self._stale

    def mark_stale(self) -> None:
        """Mark the server stale. This is final: a concurrent check must not reset it."""
        self._stale = True

    def check(self) -> None:
        """Mark it stale if it is not running or does not answer."""
        if self._stale:
            return
        if not self.answers:
            self.mark_stale()

    def clone(self, dbname: str) -> None:
        super().clone(dbname)
        self._add_ready(dbname)

    def reuse(self, dbname: str, since: int) -> str | None:
        fresh = super().reuse(dbname, since)
        if fresh is not None:
            self._add_ready(fresh)
        return fresh

    def dispose(self, dbname: str) -> None:
        self._leaks.remove_ready(dbname)
        super().dispose(dbname)

    def _add_ready(self, dbname: str) -> None:
        with self.connection() as connection:
            self._leaks.add_ready(connection, dbname)

    def lease(self, dbname: str) -> None:
        """Give a database to a lease."""
        self.occupied.add(dbname)
        self._leaks.remove_ready(dbname)

    def end_lease(self, dbname: str) -> None:
        """Take a database back from a lease."""
        self.occupied.discard(dbname)

    def take_unused(self, dbname: str) -> None:
        """Take a database back that its client did not use; if it is missing, so may be others."""
        with self.connection() as connection, connection.given(_SHORT_SECONDS):
            if not self._leaks.add_ready(connection, dbname):
                self.mark_stale()

    def persist(self, dbname: str, name: str) -> None:
        """Persist a database under another name; terminate its sessions. Raises PgTempError."""
        self._leaks.remove_ready(dbname)
        self.persisted.add(name)
        with self.connection() as connection:
            admin_sql.disconnect_all(connection, dbname)
            admin_sql.rename(connection, dbname, name)
        self.names.discard(dbname)

    def knows(self, user: str) -> bool:
        """Return whether the user's role is known to exist, so that a superuser can log in."""
        return user in self._roles

    def ensure_role(self, user: str, attributes: str, owns: str | None) -> None:
        """Create the role of a client that gets a lease, unless it exists. Raises PgTempError.

        Args:
            owns: a database that the role will own; None for none.
        """
        if user not in self._roles:
            with self._checking, self.connection() as connection:
                made = admin_sql.ensure_login(connection, user, attributes, self.plan.secret)
                # A role that a client created is not accepted, so that the leak check finds it.
                if made or self._leaks.knows_role(user):
                    self._leaks.accept_role(connection, user)
            self._roles.add(user)
        if owns is not None:
            with self.connection() as connection:
                admin_sql.set_owner(connection, owns, user)
                if self._leaks.is_ready(owns):
                    self._leaks.add_ready(connection, owns)

    def has(self, dbname: str) -> bool:
        """Return whether a database of this name exists. Raises PgTempError."""
        with self.connection() as connection, connection.given(_SHORT_SECONDS):
            return admin_sql.exists(connection, dbname)

    def check_leaks(self, dbname: str) -> None:
        """Find the leaks of an ended lease outside its database, and clean up if possible.

        Leaked roles are dropped if they cannot belong to another lease. After any other leak the
        server is stale. After an exception it is unknown what the lease leaked.
        """
        with self._checking, self.connection() as connection:
            # A session that is still running could cause further leaks.
            admin_sql.disconnect_all(connection, dbname)
            if admin_sql.has_drop_obstacles(connection, dbname):
                self._clones.dispose(dbname)
            if self._leaks.settings_were_touched(connection):
                self.epoch += 1
            found = self._leaks.found(connection)
            if not found:
                return
            names = ", ".join(f"{kind} {printable(name)}".rstrip() for kind, name in found[:_NAMED])
            if len(found) > _NAMED:
                names += f" and {len(found) - _NAMED} more"
            if self.occupied <= {dbname}:
                self._clones.dispose(dbname)  # the leaked roles may own objects in it
                found = self._leaks.clean(connection, found)
            if found:
                self.mark_stale()
            # A dropped role is created again when a client of that name connects.
            self._roles = self.plan.users
        _log.info("a lease left %s: %s", names, "the server is replaced" if found else "cleaned up")

    def abandon(self) -> None:
        """Let the supervisor stop the server; all calls that wait for the server fail."""
        self.mark_stale()
        self.interrupt()
        self.postmaster.abandon()

    def stop(self) -> None:
        """Stop the server and remove everything in it, except persisted databases."""
        if self.persisted:
            with suppress(PgTempError):  # even if the server has crashed, its data is persisted
                self.settle()
        self.close()
        if self.persisted:
            self.postmaster.stop()
        else:
            server_setup.discard(self.postmaster)
