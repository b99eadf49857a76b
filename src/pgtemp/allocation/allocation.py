"""What a lease is given, and the shape of where it comes from (see allocators.py)."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from pgtemp.allocation.shared_server import SharedServer, alive
from pgtemp.server.postmaster import Postmaster


@dataclass(eq=False, slots=True)
class Allocation:
    """A database that somebody works in.

    Attributes:
        postmaster: the server it is in.
        dbname: its name there; "" where it has to be made yet.
        roles: users who have been let in.
        number: of the lease, for the name of what is kept of it; 0 is nobody's.
        allocator: where it came from; None where it did not come from one.
        epoch: that of `shared` when it was made.
        watched: whether its server loads libraries, which may watch every statement.
        unreachable: whether its server did not answer.
        preparing: held while it is made fit for somebody.
    """

    postmaster: Postmaster
    dbname: str
    roles: set[str] = field(default_factory=set)
    number: int = 0
    allocator: Allocator | None = None
    shared: SharedServer | None = None
    epoch: int = 0
    watched: bool = False
    unreachable: bool = False
    preparing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def socket(self) -> str:
        """The path of the unix socket that leads to the server."""
        return f"{self.postmaster.socket_dir}/.s.PGSQL.{self.postmaster.port}"

    @property
    def address(self) -> tuple[str, int]:
        """Where the server asks for a password; only with a plan that has one."""
        return self.postmaster.spec.addresses[0], self.postmaster.port

    @property
    def usable(self) -> bool:
        """Whether whoever comes next can still have it."""
        return not self.unreachable and (self.allocator is None or self.allocator.usable(self))

    @property
    def outdated(self) -> bool:
        """Whether its server has changed since, as far as is known without asking it."""
        return self.shared is not None and (self.shared.stale or self.epoch != self.shared.epoch)

    @property
    def alive(self) -> bool:
        """Whether its server runs and can be reached."""
        return not self.unreachable and alive(self.postmaster)

    def give_up(self) -> None:
        """Note that its server cannot be reached: no client gets it, or another place in it."""
        self.unreachable = True
        self.mark_unreachable()

    def mark_unreachable(self) -> None:
        """Let no other client get a place in its server."""
        if self.shared is not None:
            self.shared.mark_stale()
            alive(self.postmaster)  # says in the log why, since nobody looks at a stale one again

    def lease(self, number: int) -> None:
        """From now on somebody has it."""
        self.number = number
        if self.shared is not None:
            self.shared.occupied.add(self.dbname)


class Allocator(Protocol):
    """What leases come from.

    `claim` gives a place at once where one is ready, `prepare` makes it fit for who connects,
    `release` takes it back. They block for milliseconds, so an event loop calls them in a thread;
    `claim`, `usable` and `is_prepared` alone do not block.
    """

    def claim(self) -> Future[Allocation]: ...
    def usable(self, allocation: Allocation) -> bool: ...
    def is_prepared(self, allocation: Allocation, user: str) -> bool: ...
    def prepare(self, allocation: Allocation, user: str, dbname: str) -> None: ...
    def release(self, allocation: Allocation, *, used: bool) -> None: ...
    def interrupt(self, *, discard: bool) -> None: ...
    def close(self) -> None: ...
