"""Who holds a database, and how connections are kept apart.

Two kinds of isolation, one shape: `lease` gives one, `release` takes it back. Both block for
milliseconds, so an event loop calls them in a thread.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from pgtemp.databases import admin, provision, transfer
from pgtemp.databases.kept import write_note
from pgtemp.databases.pool import Pool
from pgtemp.databases.provision import Plan
from pgtemp.errors import PgTempError
from pgtemp.server import image
from pgtemp.server.cluster import Cluster

_log = logging.getLogger("pgtemp")


@dataclass(frozen=True, slots=True)
class Lease:
    """A server and who holds it: a number, the user and the database it was leased for."""

    number: int
    cluster: Cluster
    user: str
    dbname: str

    @property
    def socket(self) -> str:
        """The path of the unix socket that leads to the server."""
        return f"{self.cluster.socket_dir}/.s.PGSQL.{self.cluster.port}"


class Isolation(Protocol):
    """How connections are kept apart."""

    def open(self) -> None:
        """Prepare; raises PgTempError where leases could not be given."""

    def claim(self) -> Future[Cluster]: ...
    def furnish(self, cluster: Cluster, user: str, dbname: str) -> Lease: ...
    def release(self, lease: Lease, *, used: bool) -> None: ...
    def close(self) -> None: ...

    @property
    def pillar(self) -> Cluster | None:
        """The server without which nothing goes on."""


class ClusterPerLease:
    """A postmaster a lease: names, roles and settings all private. From a pool kept ready."""

    def __init__(self, plan: Plan, *, ready: int, announce: Callable[[str], None]) -> None:
        self._plan = plan
        self._announce = announce
        self._numbers = itertools.count(1)
        self.pillar: Cluster | None = None  # each lease has its own
        self._base: Cluster | None = None
        self._pool: Pool[Cluster] = Pool(self, ready=ready)

    def open(self) -> None:
        """Make the server that all others are copies of: user, database and dump in place."""
        options = self._plan.options
        keeping_nothing = replace(self._plan.blueprint, keep=False, log_path=None, ttl=None)
        base = provision.provision(replace(self._plan, blueprint=keeping_nothing), None)
        try:
            to = provision.private_info(base, options.user, options.dbname)
            with admin.connected(to) as connection:
                connection.execute("SELECT 1")
            base.halt()
            source = image.of_home(base.home.path, self._plan.installation)
            source.learn(base.data_dir)
        except BaseException:
            base.stop()
            raise
        self._base = base
        self._plan = replace(
            self._plan,
            blueprint=replace(self._plan.blueprint, source=source, conf=_as_it_is),
        )
        self._pool.fill()

    def provision(self) -> Cluster:
        cluster = Cluster(self._plan.blueprint)
        cluster.start()
        return cluster

    def dispose(self, cluster: Cluster) -> None:
        try:
            provision.discard(cluster)
        except PgTempError as error:
            _log.warning("%s", error)

    def usable(self, cluster: Cluster) -> bool:
        try:
            cluster.check()
        except PgTempError as error:
            _log.warning("%s", error)
            return False
        return True

    def claim(self) -> Future[Cluster]:
        return self._pool.claim()

    def furnish(self, cluster: Cluster, user: str, dbname: str) -> Lease:
        """Make the user and the database that a client named, where they are not there."""
        lease = Lease(next(self._numbers), cluster, user, dbname)
        try:
            _furnish(self._plan, lease)
        except BaseException:
            self._pool.retire(cluster)
            raise
        return lease

    def release(self, lease: Lease, *, used: bool) -> None:
        """End the lease's server; one that was not used serves the next."""
        options, cluster = self._plan.options, lease.cluster
        plain = (lease.user, lease.dbname) == (options.user, options.dbname)
        if not used and plain and self.usable(cluster):
            self._pool.give_back(cluster)
            return
        try:
            if options.dump is not None:
                info = provision.private_info(cluster, lease.user, lease.dbname)
                to = _numbered(options.dump, lease.number)
                transfer.dump(self._plan.installation, info, to)
                self._announce(f"dumped {lease.dbname} to {to}")
        except PgTempError as error:
            _log.error("%s", error)
        if used and options.persist:
            write_note(cluster.home.path, lease.user, lease.dbname)
            cluster.stop()
            self._announce(f"kept {cluster.home.path}")
        else:
            self.dispose(cluster)

    def close(self) -> None:
        self._pool.close()
        if self._base is not None:
            self._base.stop()


class OneCluster:
    """One server for everybody: names are used as they stand in it."""

    def __init__(self, plan: Plan, *, announce: Callable[[str], None]) -> None:
        self._plan = plan
        self._announce = announce
        self._numbers = itertools.count(1)
        self.pillar: Cluster | None = None
        self._furnishing = threading.Lock()

    def open(self) -> None:
        self.pillar = provision.provision(self._plan, None)

    def claim(self) -> Future[Cluster]:
        claimed: Future[Cluster] = Future()
        assert self.pillar is not None
        try:
            self.pillar.check()
            claimed.set_result(self.pillar)
        except PgTempError as error:
            claimed.set_exception(error)
        return claimed

    def furnish(self, cluster: Cluster, user: str, dbname: str) -> Lease:
        """Make the user; a database that is not there is the client's to make."""
        with self._furnishing:
            provision.furnish_role(cluster, self._plan, user, None)
        return Lease(next(self._numbers), cluster, user, dbname)

    def release(self, lease: Lease, *, used: bool) -> None:
        """It goes on."""

    def close(self) -> None:
        cluster, options = self.pillar, self._plan.options
        if cluster is None:
            return
        try:
            if options.dump is not None:
                info = provision.private_info(cluster, options.user, options.dbname)
                transfer.dump(self._plan.installation, info, options.dump)
        except PgTempError as error:
            _log.error("%s", error)
        finally:
            if options.persist:
                write_note(cluster.home.path, options.user, options.dbname)
            cluster.stop()
        if options.persist:
            self._announce(f"kept {cluster.home.path}")


def _furnish(plan: Plan, lease: Lease) -> None:
    options = plan.options
    if lease.user != options.user:
        provision.furnish_role(lease.cluster, plan, lease.user, None)
    if lease.dbname != options.dbname:
        provision.furnish_database(lease.cluster, plan, lease.dbname, lease.user)


def _as_it_is(existing: str) -> str:
    return existing


def _numbered(path: str | os.PathLike[str], number: int) -> Path:
    """out.sql becomes out-7.sql, so that each lease has a dump of its own."""
    plain = Path(path)
    return plain.with_name(f"{plain.stem}-{number}{plain.suffix}")
