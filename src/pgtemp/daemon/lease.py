"""A lease: a database, and the clients that are connected to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from pgtemp.allocation.allocation import Allocation
from pgtemp.allocation.isolation import DatabaseRequest
from pgtemp.daemon.backend import Backend
from pgtemp.daemon.error_responses import RefusedError
from pgtemp.daemon.relay import Endpoint
from pgtemp.daemon.warm_connections import KindPool
from pgtemp.options.daemon import DaemonOptions

LINGER = "linger"  # the timer of a session without clients


@dataclass(eq=False, slots=True)
class Lease:
    """A database and the clients that are connected to it.

    Attributes:
        key: identifies the connections that share the lease; None if it has only one.
        lingers: whether it continues for a while after its last connection.
        end: ends the lease; called at a time limit, if no client is connected.
        ended: done when the lease has ended and its leak check is complete.
        opening: the task that gets its allocation; None if one was ready.
        opened: its allocation; None until it has one.
        kind: the warm connections for clients like the first one; None if there are none.
        backend: the warm connection for the first client.
        expired: the error for the clients, if a time limit was reached.
        used: whether a client sent a message.
        requested_at: when the lease was requested.
        waited: seconds from the request to the allocation.
        last_traffic: when bytes were last transferred, by the loop's clock.
        ending: the task that ends the lease; None until it ends.
        late: whether a new connection waited in vain for it to end.
    """

    number: int
    request: DatabaseRequest
    key: Hashable
    lingers: bool
    ended: asyncio.Future[None]
    end: Callable[[Lease], object]
    opening: asyncio.Task[None] | None = None
    opened: Allocation | None = None
    kind: KindPool | None = None
    backend: Backend | None = None
    expired: RefusedError | None = None
    clients: set[Endpoint] = field(default_factory=set)
    used: bool = False
    requested_at: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    connections: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    last_traffic: float = 0.0
    ending: asyncio.Task[None] | None = None
    late: bool = False

    @property
    def allocation(self) -> Allocation:
        assert self.opened is not None
        return self.opened

    @property
    def leaving(self) -> bool:
        """Whether the lease ends, or will end because all its clients have sent Terminate."""
        return not self.lingers and all(client.has_terminated for client in self.clients)

    @property
    def dead(self) -> bool:
        """Whether its server has exited or cannot be reached."""
        return self.opened is not None and not self.opened.alive

    def mark_stale(self) -> None:
        """Mark a shared server stale, so that no other lease gets an allocation in it."""
        if self.opened is not None and self.opened.shared is not None:
            self.opened.shared.mark_stale()

    def start(self, allocation: Allocation, options: DaemonOptions) -> None:
        """Assign an allocation, and start the time limits."""
        allocation.lease(self.number)
        self.opened = allocation
        self.waited = time.perf_counter() - self.requested_at
        loop = asyncio.get_running_loop()
        if (ttl := options.ttl) is not None:
            self.timers["ttl"] = loop.call_later(ttl, self._expire, f"ttl={ttl:g} s")
        if (idle := options.idle_ttl) is not None:
            self.last_traffic = loop.time()
            self.timers["idle"] = loop.call_later(idle / 4, self._watch, idle, 0)

    def _expire(self, limit: str) -> None:
        if self.expired is None:
            message = f"the database's time limit was reached ({limit})"
            self.expired = RefusedError("57P05", message)
        for client in self.clients:
            client.refuse(self.expired)
        if not self.clients:
            self.end(self)

    def _watch(self, seconds: float, before: int) -> None:
        """End the lease after `seconds` without traffic; check this four times in that period.

        Args:
            before: the traffic at the previous check.
        """
        loop = asyncio.get_running_loop()
        now = self.bytes_in + self.bytes_out + sum(c.received + c.sent for c in self.clients)
        if now != before:
            self.last_traffic = loop.time()
        if loop.time() - self.last_traffic >= seconds:
            self._expire(f"idle_ttl={seconds:g} s")
        else:
            due = min(seconds / 4, self.last_traffic + seconds - loop.time())
            self.timers["idle"] = loop.call_later(due, self._watch, seconds, now)

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
