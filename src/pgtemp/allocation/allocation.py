"""What a lease is given, and the shape of where it comes from (see allocators.py)."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from pgtemp.allocation.shared_server import TenantCluster, alive
from pgtemp.server.postmaster import Cluster


@dataclass(eq=False, slots=True)
class Place:
    """A database that somebody works in.

    Attributes:
        cluster: the server it is in.
        dbname: its name there; "" where it has to be made yet.
        roles: users who have been let in.
        number: of the lease, for the name of what is kept of it; 0 is nobody's.
        supply: where it came from; None where it did not come from one.
        epoch: that of `tenants` when it was made.
        watched: whether its server loads libraries, which may watch every statement.
        unreachable: whether its server did not answer.
        furnishing: held while it is made fit for somebody.
    """

    cluster: Cluster
    dbname: str
    roles: set[str] = field(default_factory=set)
    number: int = 0
    supply: Supply | None = None
    tenants: TenantCluster | None = None
    epoch: int = 0
    watched: bool = False
    unreachable: bool = False
    furnishing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def socket(self) -> str:
        """The path of the unix socket that leads to the server."""
        return f"{self.cluster.socket_dir}/.s.PGSQL.{self.cluster.port}"

    @property
    def address(self) -> tuple[str, int]:
        """Where the server asks for a password; only with a plan that has one."""
        return self.cluster.blueprint.addresses[0], self.cluster.port

    @property
    def usable(self) -> bool:
        """Whether whoever comes next can still have it."""
        return not self.unreachable and (self.supply is None or self.supply.usable(self))

    @property
    def outdated(self) -> bool:
        """Whether its server has changed since, as far as is known without asking it."""
        return self.tenants is not None and (self.tenants.stale or self.epoch != self.tenants.epoch)

    @property
    def alive(self) -> bool:
        """Whether its server runs and can be reached."""
        return not self.unreachable and alive(self.cluster)

    def give_up(self) -> None:
        """Note that its server cannot be reached: no client gets it, or another place in it."""
        self.unreachable = True
        self.forsake()

    def forsake(self) -> None:
        """Let no other client get a place in its server."""
        if self.tenants is not None:
            self.tenants.spoil()
            alive(self.cluster)  # says in the log why, since nobody looks at a stale one again

    def lease(self, number: int) -> None:
        """From now on somebody has it."""
        self.number = number
        if self.tenants is not None:
            self.tenants.occupied.add(self.dbname)


class Supply(Protocol):
    """What leases come from.

    `claim` gives a place at once where one is ready, `furnish` makes it fit for who connects,
    `release` takes it back. They block for milliseconds, so an event loop calls them in a thread;
    `claim`, `usable` and `furnished` alone do not block.
    """

    def claim(self) -> Future[Place]: ...
    def usable(self, place: Place) -> bool: ...
    def furnished(self, place: Place, user: str) -> bool: ...
    def furnish(self, place: Place, user: str, dbname: str) -> None: ...
    def release(self, place: Place, *, used: bool) -> None: ...
    def interrupt(self, *, discard: bool) -> None: ...
    def close(self) -> None: ...
