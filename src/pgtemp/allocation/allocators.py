"""Where leases of one template come from: a database each in one server, or a server each.

Two classes of one shape (see allocation.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from pgtemp.allocation.allocation import Place
from pgtemp.allocation.persisted import Note, try_note
from pgtemp.allocation.pool import Pool
from pgtemp.allocation.shared_server import TenantCluster, alive, printable
from pgtemp.errors import ClusterError, PgTempError
from pgtemp.host import disk_space
from pgtemp.server.postmaster import Cluster
from pgtemp.server.rundir import find_base
from pgtemp.sql import admin_sql, server_setup, statement_logging
from pgtemp.sql.server_setup import Plan
from pgtemp.templates.clones import unique_name

_log = logging.getLogger("pgtemp")
# How many times as many are kept ready, while many are wanted.
_MORE_CLUSTERS, _MORE_DATABASES = 4, 8
_TRIES = 3


class Clusters:
    """A server each: names, roles and settings all private."""

    recycles = False

    def __init__(
        self, plan: Plan, *, ready: int, attributes: str, announce: Callable[[str], None]
    ) -> None:
        self._plan = plan
        self._attributes = attributes
        self._superusers = "NOSUPERUSER" not in attributes.upper().split()
        self._announce = announce
        self._watched: bool | None = None  # of all of them, since they are made alike
        self._live: set[Place] = set()
        self._pool: Pool[Place] = Pool(self, ready=ready, most=ready * _MORE_CLUSTERS)

    def provision(self) -> Place:
        blueprint = self._plan.blueprint
        size, files = blueprint.source.resolve().extent
        base = find_base(blueprint.prefix, blueprint.owner, keep=blueprint.keep)
        disk_space.check_with_spare(base, "another server", size=size, files=files)
        cluster = Cluster(blueprint)
        cluster.start(meanwhile=self._begin)
        watched = bool(self._watched)
        place = Place(cluster, "", self._plan.users, supply=self, watched=watched)
        self._live.add(place)
        return place

    def _begin(self, cluster: Cluster) -> None:
        server_setup.give_password(cluster, self._plan)
        if self._watched is None:
            with server_setup.administered(cluster, self._plan) as connection:
                self._watched = statement_logging.is_watched(connection)

    def dispose(self, place: Place) -> None:
        self._live.discard(place)
        if place.number and self._plan.options.persist:
            try_note(place.cluster.home.path, Note(self._plan.options.user, place.dbname))
            place.cluster.stop()
            home = place.cluster.home.path
            self._announce(f"kept {home}; pgtemp open {home} serves it again")
        else:
            server_setup.discard(place.cluster)

    def usable(self, place: Place) -> bool:
        return alive(place.cluster)

    def claim(self) -> Future[Place]:
        return self._pool.claim()

    def furnished(self, place: Place, user: str) -> bool:
        return bool(place.dbname) and user in place.roles

    def furnish(self, place: Place, user: str, dbname: str) -> None:
        """Make the user; at first also the database, out of the template."""
        plan = self._plan
        with place.furnishing:
            if not place.dbname:
                server_setup.furnish_database(place.cluster, plan, dbname, plan.options.user)
                place.dbname = dbname
            if user in place.roles:
                return
            # The first who is no superuser is to own the database.
            owned = self._superusers or not place.roles <= plan.users
            owns = None if owned else place.dbname
            server_setup.admit(place.cluster, plan, user, self._attributes, owns)
            place.roles.add(user)

    def release(self, place: Place, *, used: bool) -> None:
        """End the server behind everybody's back; one that nobody has touched serves the next."""
        if not used:
            place.number = 0
        if place.dbname:
            self._pool.retire(place)
        else:
            self._pool.give_back(place)

    def interrupt(self, *, discard: bool) -> None:
        """Hand out nothing more, and end the servers, or let them go on that were stopped."""
        self._pool.refuse()
        for place in list(self._live):
            if discard and not self._plan.options.persist:
                place.cluster.abandon()
            else:
                place.cluster.unblock()

    def close(self) -> None:
        self._pool.close()


class Databases:
    """A database each, in one server; in a new one when a tenant has left something in it."""

    def __init__(
        self, plan: Plan, *, ready: int, attributes: str, announce: Callable[[str], None]
    ) -> None:
        self._plan = plan
        self._attributes = attributes
        self._superusers = "NOSUPERUSER" not in attributes.upper().split()
        self._announce = announce
        self._keep = plan.options.persist
        self._superuser = plan.options.user
        self._current: TenantCluster | None = None
        self._servers: set[TenantCluster] = set()  # that run
        self._closed = False
        self._moving = threading.Lock()
        self._pool: Pool[Place] = Pool(self, ready=ready, most=ready * _MORE_DATABASES)

    @property
    def recycles(self) -> bool:
        current = self._current
        return not self._keep and current is not None and current.recycles

    def provision(self) -> Place:
        for attempt in range(_TRIES):
            tenants = self._server()
            dbname = unique_name("lease")
            try:
                tenants.clone(dbname)
            except PgTempError:
                tenants.check()
                self._stop_if_empty(tenants)
                if not tenants.stale or attempt == _TRIES - 1:
                    raise
                continue
            epoch = tenants.epoch
            place = Place(
                tenants.cluster, dbname, supply=self, tenants=tenants, epoch=epoch,
                watched=tenants.watched,
            )  # fmt: skip
            if not tenants.stale:
                return place
            self.dispose(place)  # somebody made it stale meanwhile
        raise ClusterError("the server went stale again and again", remedy="see the log")

    def dispose(self, place: Place) -> None:
        tenants = _tenants(place)
        try:
            if self._keep and place.number:
                kept = f"{self._plan.options.dbname}_{place.number}"
                tenants.keep(place.dbname, kept)
                self._announce(f"kept database {kept} in {tenants.cluster.home.path}")
            else:
                tenants.drop(place.dbname)
        finally:
            if tenants.stale:
                self._pool.renew()
            self._stop_if_empty(tenants)

    def usable(self, place: Place) -> bool:
        _tenants(place).check()
        return not place.outdated

    def claim(self) -> Future[Place]:
        return self._pool.claim()

    def furnished(self, place: Place, user: str) -> bool:
        return self._superusers and _tenants(place).knows(user)

    def furnish(self, place: Place, user: str, dbname: str) -> None:
        """Make the user; the database has a name of its own."""
        tenants = _tenants(place)
        with place.furnishing:
            owned = self._superusers or place.roles or user == self._superuser
            tenants.admit(user, self._attributes, None if owned else place.dbname)
            if user != self._superuser:
                place.roles.add(user)

    def release(self, place: Place, *, used: bool) -> None:
        """See what was left beside the database, and drop it behind everybody's back."""
        tenants = _tenants(place)
        try:
            if used and not tenants.stale and not self._keep:
                tenants.look(place.dbname)
        except Exception as error:  # nothing is known of what was left
            tenants.spoil()
            if alive(tenants.cluster):
                _log.warning(
                    "the server is replaced, since it could not be checked for what a lease left: "
                    "%s: %s", type(error).__name__, printable(str(error)),
                )  # fmt: skip
        finally:
            tenants.occupied.discard(place.dbname)
            if not used:
                place.number = 0
            if tenants.stale:
                self._pool.renew()
            # What belongs to somebody by now cannot serve anybody else.
            if used or (place.roles and not self._superusers):
                self._pool.retire(place)
            else:
                self._pool.give_back(place)

    def made_by_hand(self, dbname: str) -> bool:
        """Whether somebody who has a lease made a database of this name."""
        return any(one.occupied and _has(one, dbname) for one in list(self._servers))

    def interrupt(self, *, discard: bool) -> None:
        """Hand out nothing more, and end the servers, or let them go on that were stopped."""
        self._closed = True
        self._pool.refuse()
        for tenants in list(self._servers):
            if discard and not self._keep:
                tenants.abandon()
            else:
                tenants.cluster.unblock()

    def close(self) -> None:
        """Give nothing more; the server goes with its last database."""
        with self._moving:
            self._closed = True
            self._current = None
        for tenants in self._servers if not self._keep else ():
            tenants.spoil()  # so that nothing is dropped in it one by one
        self._pool.close()
        for tenants in list(self._servers):
            self._stop_if_empty(tenants)

    def _stop_if_empty(self, tenants: TenantCluster) -> None:
        """End a server in which nobody is, and nobody will be."""
        if tenants.names or not (tenants.stale or self._closed):
            return
        with self._moving:
            if tenants not in self._servers:
                return
            self._servers.discard(tenants)
        if tenants.kept:
            home = tenants.cluster.home.path
            try_note(home, Note(self._superuser, admin_sql.MAINTENANCE))
            self._announce(f"kept {home}; pgtemp open {home} serves it again")
        tenants.stop()

    def _server(self) -> TenantCluster:
        with self._moving:
            if self._closed:
                raise ClusterError("pgtemp is shutting down")
            before = self._current
            if before is not None:
                before.check()
                if not before.stale:
                    return before
            self._current = current = TenantCluster(self._plan, keep=self._keep)
            self._servers.add(current)
        if before is not None:
            self._stop_if_empty(before)
        return current


def _tenants(place: Place) -> TenantCluster:
    assert place.tenants is not None
    return place.tenants


def _has(tenants: TenantCluster, dbname: str) -> bool:
    try:
        return tenants.answers and tenants.has(dbname)
    except PgTempError:  # it is just being ended
        return False
