"""Allocates one server of a template per lease; it implements the protocol in allocation.py."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from pgtemp.allocation.allocation import Allocation, are_superusers
from pgtemp.allocation.leased_server import alive
from pgtemp.allocation.pool import Pool
from pgtemp.host import disk_space
from pgtemp.server.postmaster import Postmaster
from pgtemp.server.rundir import find_base
from pgtemp.sql import server_setup, statement_logging
from pgtemp.sql.persisted_note import Note, try_note
from pgtemp.sql.server_setup import Plan

_MORE = 4  # additional ready servers while many clients connect


class ServerAllocator:
    """Allocates one server per lease: names, roles and settings are private."""

    recycles = False

    def __init__(
        self, plan: Plan, *, ready: int, attributes: str, announce: Callable[[str], None]
    ) -> None:
        self._plan = plan
        self._attributes = attributes
        self._superusers = are_superusers(attributes)
        self._announce = announce
        self._watched: bool | None = None  # the same for all servers; None if not yet known
        self._live: set[Allocation] = set()
        self._pool: Pool[Allocation] = Pool(self, ready=ready, most=ready * _MORE)

    def provision(self) -> Allocation:
        spec = self._plan.spec
        size, files = spec.source.resolve().extent
        base = find_base(spec.prefix, spec.owner, keep=spec.keep)
        disk_space.check_with_spare(base, "another server", size=size, files=files)
        postmaster = Postmaster(spec)
        postmaster.start(meanwhile=self._begin)
        watched = bool(self._watched)
        allocation = Allocation(postmaster, "", self._plan.users, allocator=self, watched=watched)
        self._live.add(allocation)
        return allocation

    def _begin(self, postmaster: Postmaster) -> None:
        server_setup.give_password(postmaster, self._plan)
        if self._watched is None:
            with server_setup.administered(postmaster, self._plan) as connection:
                self._watched = statement_logging.is_watched(connection)

    def dispose(self, allocation: Allocation) -> None:
        self._live.discard(allocation)
        if allocation.number and self._plan.options.persist:
            try_note(
                allocation.postmaster.home.path, Note(self._plan.options.user, allocation.dbname)
            )
            allocation.postmaster.stop()
            home = allocation.postmaster.home.path
            self._announce(f"persisted {home}; pgtemp open {home} starts a server on it")
        else:
            server_setup.discard(allocation.postmaster)

    def usable(self, allocation: Allocation) -> bool:
        return alive(allocation.postmaster)

    def claim(self) -> Future[Allocation]:
        return self._pool.claim()

    def is_prepared(self, allocation: Allocation, user: str) -> bool:
        return bool(allocation.dbname) and user in allocation.roles

    def prepare(self, allocation: Allocation, user: str, dbname: str) -> None:
        """Create the user and, for the first user, the database from the template."""
        plan = self._plan
        with allocation.preparing:
            if not allocation.dbname:
                server_setup.prepare_database(
                    allocation.postmaster, plan, dbname, plan.options.user
                )
                allocation.dbname = dbname
            if user in allocation.roles:
                return
            # If users are not superusers, the first one becomes the owner of the database.
            owned = self._superusers or not allocation.roles <= plan.users
            owns = None if owned else allocation.dbname
            server_setup.ensure_role(allocation.postmaster, plan, user, self._attributes, owns)
            allocation.roles.add(user)

    def release(self, allocation: Allocation, *, used: bool) -> None:
        """Stop the server in the background; an unused one is given to the next lease."""
        if not used:
            allocation.number = 0
        if allocation.dbname:
            self._pool.retire(allocation)
        else:
            self._pool.give_back(allocation)

    def interrupt(self, *, discard: bool) -> None:
        """Hand out no more allocations; stop the servers without waiting.

        Servers whose data is still needed are not stopped; their processes are continued if a
        client stopped them (SIGSTOP).
        """
        self._pool.refuse()
        for allocation in list(self._live):
            if discard and not self._plan.options.persist:
                allocation.postmaster.abandon()
            else:
                allocation.postmaster.unblock()

    def close(self) -> None:
        self._pool.close()
