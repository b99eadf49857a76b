"""A lease: a database, and the clients that are connected to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from pgtemp.allocation.allocation import Allocation
from pgtemp.allocation.isolation import DatabaseRequest
from pgtemp.daemon.backend import Backend
from pgtemp.daemon.error_responses import RefusedError
from pgtemp.daemon.relay import Endpoint

LINGER = "linger"  # the timer of a session without clients


@dataclass(eq=False, slots=True)
class Lease:
    """A database and the clients that are connected to it.

    Attributes:
        key: identifies the connections that share the lease; None if it has only one.
        lingers: whether it continues for a while after its last connection.
        expired: done when a time limit was reached; its result is the error for the clients.
        ended: done when the lease has ended and its leak check is complete.
        opening: done when the lease has its allocation.
        backend: the warm connection for the first client.
        used: whether a client sent a message.
        requested_at: when the lease was requested.
        waited: seconds from the request to the allocation.
        last_traffic: when bytes were last transferred, by the loop's clock.
        ending: whether the lease ends or has ended.
        late: whether a new connection waited in vain for it to end.
    """

    number: int
    request: DatabaseRequest
    key: Hashable
    lingers: bool
    expired: asyncio.Future[RefusedError]
    ended: asyncio.Future[None]
    opening: asyncio.Future[Allocation] = field(init=False)
    clients: set[Endpoint] = field(default_factory=set)
    backend: Backend | None = None
    used: bool = False
    requested_at: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    connections: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    last_traffic: float = 0.0
    ending: bool = False
    late: bool = False

    @property
    def allocation(self) -> Allocation:
        return self.opening.result()

    @property
    def leaving(self) -> bool:
        """Whether the lease ends, or will end because all its clients have sent Terminate."""
        return not self.lingers and all(client.has_terminated for client in self.clients)

    @property
    def dead(self) -> bool:
        """Whether its server has exited or cannot be reached."""
        opened = self.opening.done() and not self.opening.cancelled()
        return opened and self.opening.exception() is None and not self.allocation.alive

    def mark_stale(self) -> None:
        """Mark a shared server stale, so that no other lease gets an allocation in it."""
        opened = self.opening.done() and not self.opening.cancelled()
        if opened and self.opening.exception() is None and self.allocation.shared is not None:
            self.allocation.shared.mark_stale()

    def traffic(self) -> int:
        """Return the bytes transferred so far, in both directions."""
        return self.bytes_in + self.bytes_out + sum(c.received + c.sent for c in self.clients)

    def facts(self) -> dict[str, Any]:
        """Return the facts of the lease, by the names that the log uses."""
        return {
            "lease": self.number,
            "user": self.request.user,
            "database": self.request.dbname,
            "session": self.request.session,
            "connections": self.connections,
            "waited_ms": round(self.waited * 1000, 1),
            "lived_s": round(time.perf_counter() - self.requested_at, 3),
            "bytes_in": self.bytes_in + sum(client.received for client in self.clients),
            "bytes_out": self.bytes_out + sum(client.sent for client in self.clients),
        }
