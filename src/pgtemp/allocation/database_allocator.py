"""Allocates databases of one template in a shared server; implements allocation.py's protocol."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from pgtemp.allocation.allocation import Allocation, are_superusers
from pgtemp.allocation.leased_server import LeasedServer, alive, printable
from pgtemp.allocation.pool import Pool
from pgtemp.errors import ClusterError, PgTempError
from pgtemp.sql import admin_sql
from pgtemp.sql.persisted_note import Note, try_note
from pgtemp.sql.server_setup import Plan

_log = logging.getLogger("pgtemp")
_MORE = 8  # additional ready databases while many clients connect
_TRIES = 3


class DatabaseAllocator:
    """Allocates one database per lease in a shared server.

    If the server becomes stale, further databases are in a new server.
    """

    def __init__(
        self, plan: Plan, *, ready: int, attributes: str, announce: Callable[[str], None]
    ) -> None:
        self._plan = plan
        self._attributes = attributes
        self._superusers = are_superusers(attributes)
        self._announce = announce
        self._keep = plan.options.persist
        self._superuser = plan.options.user
        self._current: LeasedServer | None = None
        self._servers: set[LeasedServer] = set()  # all running servers
        self._closed = False
        self._changing = threading.Lock()
        self._pool: Pool[Allocation] = Pool(self, ready=ready, most=ready * _MORE)

    @property
    def recycles(self) -> bool:
        current = self._current
        return not self._keep and current is not None and current.recycles

    def provision(self) -> Allocation:
        for attempt in range(_TRIES):
            shared = self._server()
            try:
                dbname = shared.provision()
            except PgTempError:
                shared.check()
                self._stop_if_empty(shared)
                if not shared.stale or attempt == _TRIES - 1:
                    raise
                continue
            allocation = self._allocation(shared, dbname)
            if not shared.stale:
                return allocation
            self.dispose(allocation)  # the server became stale in the meantime
        raise ClusterError(
            f"{_TRIES} servers in a row became stale while a database was created in them",
            remedy="see the log",
        )

    def dispose(self, allocation: Allocation) -> None:
        shared = _server_of(allocation)
        try:
            if self._keep and allocation.number:
                persisted = f"{self._plan.options.dbname}_{allocation.number}"
                shared.persist(allocation.dbname, persisted)
                self._announce(f"persisted database {persisted} in {shared.postmaster.home.path}")
            elif shared.stale and not self._keep:
                shared.names.discard(allocation.dbname)  # it is removed with its server
            else:
                shared.dispose(allocation.dbname)
        except Exception:
            shared.mark_stale()
            raise
        finally:
            if shared.stale:
                self._pool.renew()
            self._stop_if_empty(shared)

    def usable(self, allocation: Allocation) -> bool:
        _server_of(allocation).check()
        return not allocation.outdated

    def claim(self) -> Future[Allocation]:
        return self._pool.claim()

    def is_prepared(self, allocation: Allocation, user: str) -> bool:
        return self._superusers and _server_of(allocation).knows(user)

    def prepare(self, allocation: Allocation, user: str, dbname: str) -> None:
        """Create the user; the database already exists."""
        shared = _server_of(allocation)
        with allocation.preparing:
            owned = self._superusers or allocation.roles or user == self._superuser
            shared.ensure_role(user, self._attributes, None if owned else allocation.dbname)
            if user != self._superuser:
                allocation.roles.add(user)

    def release(self, allocation: Allocation, *, used: bool) -> None:
        """Run the leak check, and drop the lease's database in the background."""
        shared = _server_of(allocation)
        try:
            if used and not shared.stale and not self._keep:
                shared.check_leaks(allocation.dbname)
            elif not used and not shared.stale:
                shared.take_unused(allocation.dbname)
        except Exception as error:  # it is unknown what the lease left
            shared.mark_stale()
            if not self._closed and alive(shared.postmaster):
                _log.warning(
                    "the server is replaced, because the leak check after a lease failed: "
                    "%s: %s", type(error).__name__, printable(str(error)),
                )  # fmt: skip
        finally:
            shared.end_lease(allocation.dbname)
            if not used:
                allocation.number = 0
            if shared.stale:
                self._pool.renew()
            # A database that is already owned by a user cannot be given to another user.
            if used or (allocation.roles and not self._superusers):
                self._pool.retire(allocation, None if self._keep else self._reuse)
            else:
                self._pool.give_back(allocation)

    def _allocation(self, shared: LeasedServer, dbname: str) -> Allocation:
        return Allocation(
            shared.postmaster, dbname, allocator=self, shared=shared, epoch=shared.epoch,
            watched=shared.watched,
        )  # fmt: skip

    def _reuse(self, allocation: Allocation) -> Allocation | None:
        """Return an allocation of the same database if the lease did not modify it."""
        shared = _server_of(allocation)
        if shared.stale or not allocation.number:
            return None
        dbname = shared.reuse(allocation.dbname, allocation.since)
        if dbname is None:
            return None
        allocation.dbname = dbname
        if shared.stale:  # it became stale in the meantime
            return None
        return self._allocation(shared, dbname)

    def made_by_hand(self, dbname: str) -> bool:
        """Return whether a client created a database of this name within its lease."""
        return any(one.occupied and _has(one, dbname) for one in list(self._servers))

    def interrupt(self, *, discard: bool) -> None:
        """Hand out no more allocations; stop the servers without waiting.

        Servers whose data is still needed are not stopped; their processes are continued if a
        client stopped them (SIGSTOP).
        """
        self._closed = True
        self._pool.refuse()
        for shared in list(self._servers):
            if discard and not self._keep:
                shared.abandon()
            else:
                shared.postmaster.unblock()

    def close(self) -> None:
        """Create no more allocations; stop each server when its last database is dropped."""
        with self._changing:
            self._closed = True
            self._current = None
        for shared in self._servers if not self._keep else ():
            shared.mark_stale()  # so that its databases are not dropped one by one
        self._pool.close()
        for shared in list(self._servers):
            self._stop_if_empty(shared)

    def _stop_if_empty(self, shared: LeasedServer) -> None:
        """Stop a server that has no databases and will get no more."""
        if shared.names or not (shared.stale or self._closed):
            return
        with self._changing:
            if shared not in self._servers:
                return
            self._servers.discard(shared)
        if shared.persisted:
            home = shared.postmaster.home.path
            try_note(home, Note(self._superuser, admin_sql.MAINTENANCE))
            self._announce(f"persisted {home}; pgtemp open {home} starts a server on it")
        shared.stop()

    def _server(self) -> LeasedServer:
        with self._changing:
            if self._closed:
                raise ClusterError("pgtemp is shutting down")
            before = self._current
            if before is not None:
                before.check()
                if not before.stale:
                    return before
            self._current = current = LeasedServer(self._plan)
            self._servers.add(current)
        if before is not None:
            self._stop_if_empty(before)
        return current


def _server_of(allocation: Allocation) -> LeasedServer:
    assert allocation.shared is not None
    return allocation.shared


def _has(shared: LeasedServer, dbname: str) -> bool:
    try:
        return shared.answers and shared.has(dbname)
    except PgTempError:  # the server is being stopped
        return False
