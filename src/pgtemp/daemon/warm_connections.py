"""Warm connections: opened in advance, so that a client need not wait for a login.

The first client of a clone would wait for a fork, a login and cold caches, which together take
longer than a connection to a database in use. So for each kind of client seen before (the same
allocator and exactly the same parameters), the daemon connects to the next databases in advance. It
sends the same start-up packet as such a client, except for the database's name, so no setting is
emulated. It stores the server's answer, and hands both over to the next client of the kind.

If the last two clients of a kind started with the same statement, the daemon also plans that
statement, without executing it: the tests of a suite often start alike, and so do drivers that
query the types of a database.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Coroutine, Hashable
from dataclasses import dataclass
from typing import Any

from pgtemp.allocation.allocation import Allocation
from pgtemp.allocation.isolation import DatabaseRequest, Isolation
from pgtemp.daemon import database_request
from pgtemp.daemon.backend import Backend, connect, plan_statement
from pgtemp.daemon.server_threads import in_turn
from pgtemp.errors import PgTempError
from pgtemp.host import procfs
from pgtemp.options.daemon import DaemonOptions
from pgtemp.wire.messages import ANY_PLAN, ProtocolError, in_read_only_transaction
from pgtemp.wire.startup import Startup

_log = logging.getLogger("pgtemp.daemon")
MOST_KINDS = 8  # of clients; the kinds seen last
_IDLE_SECONDS = 60.0
_REFILL_DELAY = 0.02  # seconds
_PLAN_SECONDS = 1.0
_MIN_CONNECTIONS = 50  # of a server (max_connections)

Kind = tuple[Hashable, int, frozenset[tuple[str, str]]]
Tasks = set[asyncio.Task[None]]


@dataclass(slots=True)
class WarmConnection:
    """A database and a connection to it whose login is complete."""

    allocation: Allocation
    backend: Backend

    @property
    def outdated(self) -> bool:
        """Whether it was closed or its server has changed, as far as is known without a query."""
        allocation = self.allocation
        return self.backend.server.at_eof or allocation.outdated or allocation.unreachable

    @property
    def answers(self) -> bool:
        """Whether its backend runs: a client can stop the backend of another connection."""
        key = self.backend.login.key
        return not self.outdated and (
            key is None or not procfs.is_stopped(int.from_bytes(key[:4], "big"))
        )

    @property
    def usable(self) -> bool:
        """Whether its backend and its server run."""
        return self.answers and self.allocation.usable


class KindPool:
    """The warm connections for one kind of client.

    Attributes:
        ready: those that no client has taken yet.
        used_at: when a client of this kind last connected, by the loop's clock.
        expiry: the timer that drops the kind.
    """

    expiry: asyncio.TimerHandle

    def __init__(
        self, all_kinds: WarmConnections, request: DatabaseRequest, startup: Startup
    ) -> None:
        self._all, self.request, self._startup = all_kinds, request, startup
        self.ready: deque[WarmConnection] = deque()
        self.used_at = asyncio.get_running_loop().time()
        self._watched = database_request.may_log_statements(startup)
        self._making = 0
        self._seen = False  # whether a client of this kind has connected before
        self._closed = False  # whether no more connections are opened
        self._begun = b""  # messages that plan the first statement of the last client
        self._plan = b""  # the same messages, if the client before started with that statement too
        self._unplanned = b""  # messages that could not be planned

    def take(self, *, lasting: bool) -> WarmConnection | None:
        """Return a warm connection if there is one; start to open the next.

        Args:
            lasting: whether later clients open new connections to the server, so that it must be
                usable. Otherwise the open connection shows well enough that the server runs; a
                query would double the time of this function.
        """
        found = None
        while self.ready and found is None:
            found = self.ready.popleft()
            if not (found.usable if lasting else found.answers):
                self.release(found)
                found = None
        if self._seen:
            # Delay the refill so that it does not compete with this client for a core.
            asyncio.get_running_loop().call_later(_REFILL_DELAY, self._fill)
        self._seen = True  # warm connections start with the second client of a kind
        return found

    def record(self, plan: bytes) -> None:
        """Record the first statement of a client; see wire/firststatement.py."""
        self._plan = plan if plan == self._begun != self._unplanned else b""
        self._begun = plan

    def sweep(self) -> None:
        """Release outdated connections, so that a stale server can stop."""
        for warm in [warm for warm in self.ready if warm.outdated]:
            self.ready.remove(warm)
            self.release(warm)

    def close(self) -> None:
        """Release all connections, and open no more."""
        self._closed = True
        self.expiry.cancel()
        while self.ready:
            self.release(self.ready.popleft())

    def release(self, warm: WarmConnection) -> None:
        """Close a connection that no client has used, and give its allocation back."""
        warm.backend.close()
        self._give_back(warm.allocation, used=False)

    def _give_back(self, allocation: Allocation, *, used: bool) -> None:
        work = in_turn(
            allocation,
            lambda: self._all.isolation.release(allocation, self.request, used=used),
            seconds=None,
        )
        _start(work, self._all.releasing)

    def _fill(self) -> None:
        while len(self.ready) + self._making < self._all.wanted and not self._closed:
            self._making += 1
            _start(self._add_one(), self._all.opening)

    async def _add_one(self) -> None:
        try:
            warm = await self._open()
        except (PgTempError, ProtocolError, OSError) as error:
            _log.debug("a warm connection could not be opened: %s", error)
            return
        finally:
            self._making -= 1
        if warm is None:
            # The client that sends this packet must get the error itself. The kind expires, and is
            # tried again later.
            self._closed = True
        elif self._closed:
            self.release(warm)
        else:
            self.ready.append(warm)

    async def _open(self) -> WarmConnection | None:
        """Open one; None if the server refuses the login, or sends more than can be stored."""
        claimed = self._all.isolation.claim(self.request)
        allocation = claimed.result() if claimed.done() else await asyncio.wrap_future(claimed)
        backend, warm, used = None, None, False
        try:
            backend = await connect(
                self._all.isolation, allocation, self.request, self._startup, log_in=True
            )
            if backend.login.ready:
                used = bool(self._plan)  # the planner may call a function that never returns
                if allocation.watched or self._watched or await self._plan_on(backend):
                    warm = WarmConnection(allocation, backend)
            return warm
        finally:
            if warm is None:
                if backend is not None:
                    backend.close()
                self._give_back(allocation, used=used)

    async def _plan_on(self, backend: Backend) -> bool:
        """Plan the recorded statement, or else a catalog query; return whether it was planned.

        Raises:
            ProtocolError: the recorded statement could not be planned.
        """
        plan, planned = self._plan, False
        try:
            async with asyncio.timeout(_PLAN_SECONDS):
                planned = await plan_statement(
                    backend, in_read_only_transaction(plan) if plan else ANY_PLAN
                )
        except TimeoutError:
            if not plan:
                raise
        if plan and not planned:
            self._plan, self._unplanned = b"", plan
            raise ProtocolError("the clients' first statement could not be planned in advance")
        return planned


class WarmConnections:
    """Warm connections for clients like those seen before.

    Attributes:
        wanted: how many are kept ready for each kind of client.
        opening: the tasks that open connections.
        releasing: the tasks that give allocations back.
    """

    def __init__(self, isolation: Isolation, options: DaemonOptions) -> None:
        self.isolation = isolation
        # Warm connections must not use up a small max_connections that clients need. And a client
        # that must give a password cannot get a connection that is logged in.
        limit = str(options.config.get("max_connections", _MIN_CONNECTIONS))
        few = limit.isdecimal() and int(limit) < _MIN_CONNECTIONS
        self.wanted = 0 if few or options.password_file is not None else options.pool
        self._kinds: OrderedDict[Kind, KindPool] = OrderedDict()
        self.opening: Tasks = set()
        self.releasing: Tasks = set()

    def kind(self, request: DatabaseRequest, startup: Startup) -> KindPool | None:
        """Return the warm connections for clients like this one; None if there can be none."""
        allocation_kind = self.isolation.kind(request)
        if allocation_kind is None or not self.wanted or database_request.names_session(startup):
            return None  # if the packet names a session, no other client sends the same packet
        parameters = frozenset(pair for pair in startup.parameters.items() if pair[0] != "database")
        kind = allocation_kind, startup.version, parameters
        pool = self._kinds.get(kind)
        if pool is None:
            pool = self._kinds[kind] = KindPool(self, request, startup)
            self._expire(kind, pool)
        self._kinds.move_to_end(kind)
        pool.used_at = asyncio.get_running_loop().time()
        while len(self._kinds) > MOST_KINDS:
            self._kinds.popitem(last=False)[1].close()
        return pool

    def spare(self, request: DatabaseRequest) -> Allocation | None:
        """Return an allocation from a warm connection for another kind of client.

        For use when no new allocation can be made. If no such connection fits, all warm connections
        are closed, which frees disk space.
        """
        allocation_kind = self.isolation.kind(request)
        for (other_kind, *_), pool in self._kinds.items():
            if other_kind == allocation_kind and pool.request.user == request.user:
                while pool.ready:
                    found = pool.ready.pop()
                    if found.usable:
                        found.backend.close()
                        return found.allocation
                    pool.release(found)
        self._close_all()
        return None

    def sweep(self) -> None:
        """Release outdated warm connections, so that a stale server can stop."""
        for pool in self._kinds.values():
            pool.sweep()

    async def close(self) -> None:
        """Close all warm connections, and wait until their allocations are given back."""
        for task in self.opening:
            task.cancel()
        self._close_all()
        while tasks := self.opening | self.releasing:
            await asyncio.wait(tasks)

    def _close_all(self) -> None:
        while self._kinds:
            self._kinds.popitem()[1].close()

    def _expire(self, kind: Kind, pool: KindPool) -> None:
        """Drop a kind if no client has used it for _IDLE_SECONDS; else look again later."""
        loop = asyncio.get_running_loop()
        left = pool.used_at + _IDLE_SECONDS - loop.time()
        if left > 0:
            pool.expiry = loop.call_later(left, self._expire, kind, pool)
        else:
            self._kinds.pop(kind).close()


def _start(work: Coroutine[Any, Any, None], tasks: Tasks) -> None:
    task = asyncio.ensure_future(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
