"""The allocation of a lease, and the protocol of allocators (two modules, *_allocator.py)."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from pgtemp.allocation.leased_server import LeasedServer, alive
from pgtemp.server.postmaster import Postmaster


def are_superusers(attributes: str) -> bool:
    """Return whether roles with these attributes are superusers (`--role-attributes`)."""
    return "NOSUPERUSER" not in attributes.upper().split()


@dataclass(eq=False, slots=True)
class Allocation:
    """A database in a server, for one lease.

    Attributes:
        postmaster: the server that contains the database.
        dbname: the name of the database; "" if it does not exist yet.
        roles: the users that it was prepared for.
        number: the number of the lease, used in the names of dumps and persisted data; 0 without a
            lease.
        allocator: the allocator that created it; None if no allocator did.
        shared: the server, if it is shared with other leases.
        epoch: the epoch of `shared` when the allocation was created.
        watched: whether settings of the server log or report every statement.
        unreachable: whether the server did not answer.
        since: the file system's time when a lease got it, in nanoseconds since the epoch.
        preparing: a lock that is held while the allocation is prepared for a user.
    """

    postmaster: Postmaster
    dbname: str
    roles: set[str] = field(default_factory=set)
    number: int = 0
    allocator: Allocator | None = None
    shared: LeasedServer | None = None
    epoch: int = 0
    watched: bool = False
    unreachable: bool = False
    since: int = 0
    preparing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def socket(self) -> str:
        """The path of the server's unix socket."""
        return f"{self.postmaster.socket_dir}/.s.PGSQL.{self.postmaster.port}"

    @property
    def address(self) -> tuple[str, int]:
        """The TCP address of the server; only if its plan has a password."""
        return self.postmaster.spec.addresses[0], self.postmaster.port

    @property
    def usable(self) -> bool:
        """Whether it can be given to another lease."""
        return not self.unreachable and (self.allocator is None or self.allocator.usable(self))

    @property
    def outdated(self) -> bool:
        """Whether its server is known to have changed since; no query is sent."""
        return self.shared is not None and (self.shared.stale or self.epoch != self.shared.epoch)

    @property
    def alive(self) -> bool:
        """Whether its server is running and reachable."""
        return not self.unreachable and alive(self.postmaster)

    def give_up(self) -> None:
        """Mark the server unreachable, so that no client gets this or another allocation in it."""
        self.unreachable = True
        self.mark_unreachable()

    def mark_unreachable(self) -> None:
        """Prevent the allocator from giving other clients allocations in this server."""
        if self.shared is not None:
            self.shared.mark_stale()
            alive(self.postmaster)  # logs the reason; a stale server is not checked again

    def lease(self, number: int) -> None:
        """Assign the allocation to a lease."""
        self.number = number
        if self.shared is not None:
            self.shared.lease(self.dbname)
            self.since = self.shared.now()


class Allocator(Protocol):
    """Creates allocations for leases.

    `claim` returns an allocation, immediately if one is ready; `prepare` prepares it for a user;
    `release` takes it back. `prepare`, `release`, `interrupt` and `close` block for milliseconds,
    so an event loop must call them in a thread; `claim`, `usable` and `is_prepared` do not block.
    """

    def claim(self) -> Future[Allocation]: ...
    def usable(self, allocation: Allocation) -> bool: ...
    def is_prepared(self, allocation: Allocation, user: str) -> bool: ...
    def prepare(self, allocation: Allocation, user: str, dbname: str) -> None: ...
    def release(self, allocation: Allocation, *, used: bool) -> None: ...
    def interrupt(self, *, discard: bool) -> None: ...
    def close(self) -> None: ...
