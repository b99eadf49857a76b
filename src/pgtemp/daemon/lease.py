"""A lease: a database, and who is connected to it."""

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

LINGER = "linger"  # the timer of a session that nobody is connected to


@dataclass(eq=False, slots=True)
class Lease:
    """A database and who is connected to it.

    Attributes:
        key: what its connections have in common; None where there is only one.
        lingers: whether it outlives its last connection for a while.
        backend: a connection that was opened ahead, for the first client.
        over: done when its time is; with what clients are told.
        late: whether a new connection waited in vain for it to end.
        ended: done when what it left was looked at.
    """

    number: int
    request: DatabaseRequest
    key: Hashable
    lingers: bool
    over: asyncio.Future[RefusedError]
    ended: asyncio.Future[None]
    opening: asyncio.Future[Allocation] = field(init=False)
    clients: set[Endpoint] = field(default_factory=set)
    backend: Backend | None = None
    used: bool = False
    asked: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    connections: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    spoke: float = 0.0  # when something was last said in it, by the loop's clock
    ending: bool = False
    late: bool = False

    @property
    def allocation(self) -> Allocation:
        return self.opening.result()

    @property
    def leaving(self) -> bool:
        """Whether it ends, or is about to."""
        return not self.lingers and all(client.left for client in self.clients)

    @property
    def dead(self) -> bool:
        """Whether its server is no more."""
        opened = self.opening.done() and not self.opening.cancelled()
        return opened and self.opening.exception() is None and not self.allocation.alive

    def distrust(self) -> None:
        """Give no other lease a place in its server; one that it shares with others."""
        opened = self.opening.done() and not self.opening.cancelled()
        if opened and self.opening.exception() is None and self.allocation.shared is not None:
            self.allocation.shared.mark_stale()

    def traffic(self) -> int:
        """Bytes so far, either way."""
        return self.bytes_in + self.bytes_out + sum(c.received + c.sent for c in self.clients)

    def facts(self) -> dict[str, Any]:
        """What there is to tell of it, by the names of the log's."""
        return {
            "lease": self.number,
            "user": self.request.user,
            "database": self.request.dbname,
            "session": self.request.session,
            "connections": self.connections,
            "waited_ms": round(self.waited * 1000, 1),
            "lived_s": round(time.perf_counter() - self.asked, 3),
            "bytes_in": self.bytes_in + sum(client.received for client in self.clients),
            "bytes_out": self.bytes_out + sum(client.sent for client in self.clients),
        }
