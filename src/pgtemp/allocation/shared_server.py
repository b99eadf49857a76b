"""One server in which many leases have a database each."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress

from pgtemp.allocation.leaks import LeakCheck
from pgtemp.errors import PgTempError
from pgtemp.host import procfs
from pgtemp.server.postmaster import Postmaster
from pgtemp.sql import admin_sql, server_setup, statement_logging
from pgtemp.sql.admin_connections import AdminConnections
from pgtemp.sql.server_setup import Plan
from pgtemp.templates.clones import Clones

_log = logging.getLogger("pgtemp")
_GLANCE_SECONDS = 2.0  # for a question whose answer only makes an error message better


def printable(text: str) -> str:
    """A text for the log, on one line whatever a client has put into it."""
    return text if text.isprintable() else ascii(text)


def alive(postmaster: Postmaster) -> bool:
    """Whether a server runs and is not stopped; logs a warning if not."""
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
    """A server that starts with a sealed template, and the databases that are cloned from it.

    Attributes:
        names: of its databases, from before they are made until after they are dropped.
        occupied: names of the databases that somebody has.
        kept: names of the databases that stay when the server ends.
        watched: whether it loads libraries, which may watch every statement.
        epoch: counts changes of what logins depend on; a connection of an earlier one is outdated.
    """

    def __init__(self, plan: Plan, *, keep: bool) -> None:
        """Start it. Raises PgTempError."""
        assert plan.template is not None
        self._plan = plan
        self._keep = keep
        self.names: set[str] = set()
        self.occupied: set[str] = set()
        self.kept: set[str] = set()
        self.epoch = 0
        self._stale = False
        self._looking = threading.Lock()
        self.postmaster = Postmaster(plan.spec)
        self.postmaster.start(meanwhile=lambda started: server_setup.give_password(started, plan))
        try:
            to = server_setup.private_info(self.postmaster, plan.superuser, admin_sql.MAINTENANCE)
            self._admins = AdminConnections(to, self.postmaster.check)
            self._clones = Clones(self._admins, plan.template, plan.options.user, "")
            self._residue = LeakCheck(self.postmaster.data_dir, self._owns)
            with self._admins.connection() as connection:
                if not keep:
                    # Clients must not change template1.
                    admin_sql.forbid_connections(connection, admin_sql.BASE)
                self._residue.accept(connection)
                self.watched = statement_logging.is_watched(connection)
        except BaseException:
            server_setup.discard(self.postmaster)
            raise
        self._roles = plan.users

    @property
    def recycles(self) -> bool:
        """Whether a database that was dropped makes the next one cheaper."""
        return not self._stale and self._clones.recycles

    def _owns(self, name: str) -> bool:
        return name in self.names or name in self.kept or self._clones.owns(name)

    @property
    def answers(self) -> bool:
        """Whether it runs, and has answered all that pgtemp asked."""
        if self._admins.unanswered:
            _log.warning("PostgreSQL (pid %d) does not answer", self.postmaster.pid)
            return False
        return alive(self.postmaster)

    @property
    def stale(self) -> bool:
        """Whether it is no longer as it should be, so that nobody moves in any more."""
        return self._stale

    def mark_stale(self) -> None:
        """It is stale from now on; no thread that looks at the same time may take that back."""
        self._stale = True

    def check(self) -> None:
        """Mark it stale if it does not run or does not answer."""
        if self._stale:
            return
        if not self.answers:
            self.mark_stale()

    def clone(self, dbname: str) -> None:
        """Make a database. Raises PgTempError; nothing of it is left then."""
        self.names.add(dbname)
        try:
            self._clones.make(dbname)
        except BaseException:
            self.names.discard(dbname)
            raise

    def drop(self, dbname: str) -> None:
        """Drop a database, whoever is in it. After any error the server is stale."""
        try:
            if not self.stale or self._keep:
                self._clones.dispose(dbname)
        except Exception:
            self.mark_stale()
            raise
        finally:
            self.names.discard(dbname)

    def keep(self, dbname: str, name: str) -> None:
        """Keep a database under another name; whoever is in it is ended. Raises PgTempError."""
        self.kept.add(name)
        with self._admins.connection() as connection:
            admin_sql.disconnect_all(connection, dbname)
            admin_sql.rename(connection, dbname, name)
        self.names.discard(dbname)

    def knows(self, user: str) -> bool:
        """Whether there is nothing to be done to let a superuser in."""
        return user in self._roles

    def ensure_role(self, user: str, attributes: str, owns: str | None) -> None:
        """Make a role for somebody who moves in, unless it is there. Raises PgTempError.

        Args:
            owns: the database that is to be the user's.
        """
        if user not in self._roles:
            with self._looking, self._admins.connection() as connection:
                admin_sql.ensure_login(connection, user, attributes, self._plan.secret)
                self._residue.accept_role(connection, user)
            self._roles.add(user)
        if owns is not None:
            with self._admins.connection() as connection:
                admin_sql.set_owner(connection, owns, user)

    def has(self, dbname: str) -> bool:
        """Whether there is a database of this name. Raises PgTempError."""
        with self._admins.connection() as connection, connection.given(_GLANCE_SECONDS):
            return admin_sql.exists(connection, dbname)

    def look(self, dbname: str) -> None:
        """Find what a tenant who leaves has left beside its database, and clean up if possible.

        Roles are dropped where there is no other tenant that they could belong to. At anything
        else the server is stale. Any exception means that nothing is known of what was left.
        """
        with self._looking, self._admins.connection() as connection:
            # A session that is still running could leave more behind.
            admin_sql.disconnect_all(connection, dbname)
            if admin_sql.has_drop_obstacles(connection, dbname):
                self._clones.dispose(dbname)
            if self._residue.settings_were_touched(connection):
                self.epoch += 1
            found = self._residue.found(connection)
            if not found:
                return
            names = ", ".join(f"{kind} {printable(name)}".rstrip() for kind, name in found)
            if self.occupied <= {dbname}:
                self._clones.dispose(dbname)  # the roles may own what is in it
                found = self._residue.clean(connection, found)
            if found:
                self.mark_stale()
            # A role that is gone is made again for the next who comes with its name.
            self._roles = self._plan.users
        _log.info("a lease left %s: %s", names, "a new server" if found else "cleaned up")

    def abandon(self) -> None:
        """Let the warden end the server; all that waits for it fails."""
        self.mark_stale()
        self._admins.closing.set()
        self.postmaster.abandon()

    def stop(self) -> None:
        """End the server with all that is in it, but for what is kept."""
        if self.kept:
            with suppress(PgTempError):  # it has died, and what is kept is kept all the same
                self._clones.settle()
        self._admins.close()
        self._clones.close()
        if self.kept:
            self.postmaster.stop()
        else:
            server_setup.discard(self.postmaster)
