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
import re
from collections import OrderedDict, deque
from collections.abc import Coroutine, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pgtemp.allocation.allocation import Allocation
from pgtemp.allocation.isolation import DatabaseRequest, Isolation
from pgtemp.daemon import database_request
from pgtemp.daemon.backend import Backend, connect, log_in, plan_statement, prepare
from pgtemp.daemon.shares import in_turn_at_last
from pgtemp.errors import PgTempError
from pgtemp.host import procfs
from pgtemp.sql.statement_logging import WATCHING
from pgtemp.wire.messages import ANY_PLAN, ProtocolError, in_read_only_transaction
from pgtemp.wire.startup import Startup

_log = logging.getLogger("pgtemp.daemon")
MOST_KINDS = 8  # of clients; the kinds seen last
_IDLE_SECONDS = 60.0
_REFILL_DELAY = 0.02  # seconds
_PLAN_SECONDS = 1.0
# A short switch of `postgres` other than -c: for example, -d and -s turn on logging.
_SHORT_SWITCH = re.compile(r"(^|\s)-[^c\s-]")

Kind = tuple[Hashable, int, frozenset[tuple[str, str]]]


@dataclass(slots=True)
class WarmConnection:
    """A database and a connection to it whose login is complete."""

    allocation: Allocation
    backend: Backend


@dataclass(slots=True)
class _KindPool:
    """The warm connections for one kind of client.

    Attributes:
        making: the number of connections that are being opened.
        seen: whether a client of this kind has connected before.
        refused: whether the server refused the login, or sent more than can be stored.
        begun: messages that plan the first statement of the last client.
        plan: the same messages, if the client before started with that statement too.
        unplanned: messages that could not be planned.
        taken: when a client of this kind last connected, by the loop's clock.
    """

    request: DatabaseRequest
    startup: Startup
    ready: deque[WarmConnection] = field(default_factory=deque)
    making: int = 0
    seen: bool = False
    refused: bool = False
    begun: bytes = b""
    plan: bytes = b""
    unplanned: bytes = b""
    taken: float = 0.0
    expiry: asyncio.TimerHandle | None = None


class WarmConnections:
    """Warm connections for clients like those seen before."""

    def __init__(self, isolation: Isolation, *, ready: int) -> None:
        self._isolation = isolation
        self._wanted = ready
        self._kinds: OrderedDict[Kind, _KindPool] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, request: DatabaseRequest, startup: Startup) -> WarmConnection | None:
        """Return a warm connection for this client if there is one; start to open the next."""
        allocation_kind = self._isolation.kind(request)
        if allocation_kind is None or not self._wanted or database_request.names_session(startup):
            return None  # if the packet names a session, no other client sends the same packet
        kind = _kind(allocation_kind, startup)
        pool = self._kinds.setdefault(kind, _KindPool(request, startup))
        self._kinds.move_to_end(kind)
        pool.taken = asyncio.get_running_loop().time()
        if pool.expiry is None:
            self._expire_later(kind, pool, _IDLE_SECONDS)
        while len(self._kinds) > MOST_KINDS:
            self._drop(next(iter(self._kinds)))
        found = None
        while pool.ready and found is None:
            found = pool.ready.popleft()
            # An open connection shows that its server runs; a query would double the time of this
            # function. But for a session, later clients open new connections to the server, so it
            # must be usable.
            fit = _usable(found) if request.session is not None else _is_open(found)
            if not fit:
                self._do(self._give_back(pool, found))
                found = None
        if pool.seen:
            # Delay the refill so that it does not compete with this client for a core.
            asyncio.get_running_loop().call_later(_REFILL_DELAY, self._fill, kind, pool)
        pool.seen = True  # warm connections start with the second client of a kind
        return found

    def record(self, request: DatabaseRequest, startup: Startup, plan: bytes) -> None:
        """Record the first statement of a client; see wire/firststatement.py."""
        allocation_kind = self._isolation.kind(request)
        pool = (
            self._kinds.get(_kind(allocation_kind, startup))
            if allocation_kind is not None
            else None
        )
        if pool is not None:
            pool.plan = plan if plan == pool.begun != pool.unplanned else b""
            pool.begun = plan

    def spare(self, request: DatabaseRequest) -> Allocation | None:
        """Return an allocation from a warm connection for another kind of client.

        For use when no new allocation can be made. If no such connection fits, all warm connections
        are closed, which frees disk space.
        """
        allocation_kind = self._isolation.kind(request)
        for (other_kind, *_), pool in self._kinds.items():
            if other_kind == allocation_kind and pool.request.user == request.user:
                while pool.ready:
                    found = pool.ready.pop()
                    if _usable(found):
                        found.backend.close()
                        return found.allocation
                    self._do(self._give_back(pool, found))
        for kind in list(self._kinds):
            self._drop(kind)
        return None

    def sweep(self) -> None:
        """Release unusable warm connections, so that a stale server can stop."""
        for pool in self._kinds.values():
            for warm in [warm for warm in pool.ready if not _usable(warm)]:
                pool.ready.remove(warm)
                self._do(self._give_back(pool, warm))

    def _fill(self, kind: Kind, pool: _KindPool) -> None:
        while len(pool.ready) + pool.making < self._wanted and not pool.refused:
            if self._kinds.get(kind) is not pool:
                return
            pool.making += 1
            self._do(self._add_one(kind, pool))

    async def close(self) -> None:
        """Close all warm connections, and wait for the running tasks."""
        for task in self._tasks:
            task.cancel()
        for kind in list(self._kinds):
            self._drop(kind)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _drop(self, kind: Kind) -> None:
        pool = self._kinds.pop(kind)
        if pool.expiry is not None:
            pool.expiry.cancel()
        while pool.ready:
            self._do(self._give_back(pool, pool.ready.popleft()))

    def _expire_later(self, kind: Kind, pool: _KindPool, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        pool.expiry = loop.call_later(seconds, self._expire, kind, pool)

    def _expire(self, kind: Kind, pool: _KindPool) -> None:
        """Drop the warm connections of a kind that no client has used for _IDLE_SECONDS."""
        left = pool.taken + _IDLE_SECONDS - asyncio.get_running_loop().time()
        if left > 0:
            self._expire_later(kind, pool, left)
        else:
            self._drop(kind)

    async def _add_one(self, kind: Kind, pool: _KindPool) -> None:
        try:
            warm = await self._open(pool)
        except (PgTempError, ProtocolError, OSError) as error:
            _log.debug("a warm connection could not be opened: %s", error)
            return
        finally:
            pool.making -= 1
        if warm is None:
            # The client that sends this packet must get the error itself. The kind expires, and is
            # tried again later.
            pool.refused = True
        elif self._kinds.get(kind) is pool:
            pool.ready.append(warm)
        else:
            await self._give_back(pool, warm)

    async def _open(self, pool: _KindPool) -> WarmConnection | None:
        allocation = await asyncio.wrap_future(self._isolation.claim(pool.request))
        backend: Backend | None = None
        busy = False
        try:
            dbname = await prepare(self._isolation, allocation, pool.request)
            backend = await connect(allocation, pool.startup, dbname, by_password=False)
            if await log_in(backend, allocation):
                watched = allocation.watched or _is_watched(pool.startup)
                busy = bool(pool.plan)  # the planner may call a function that never returns
                if watched or await self._plan(pool, backend):
                    return WarmConnection(allocation, backend)
        except BaseException:
            await self._close(pool, allocation, backend, used=busy)
            raise
        await self._close(pool, allocation, backend)
        return None

    async def _plan(self, pool: _KindPool, backend: Backend) -> bool:
        """Plan the recorded statement, or else a catalog query; return whether it was planned.

        Raises:
            ProtocolError: the recorded statement could not be planned.
        """
        plan = pool.plan
        if not plan:
            async with asyncio.timeout(_PLAN_SECONDS):
                return await plan_statement(backend, ANY_PLAN)
        with suppress(TimeoutError):
            async with asyncio.timeout(_PLAN_SECONDS):
                if await plan_statement(backend, in_read_only_transaction(plan)):
                    return True
        pool.plan, pool.unplanned = b"", plan
        raise ProtocolError("the clients' first statement could not be planned in advance")

    async def _give_back(self, pool: _KindPool, warm: WarmConnection) -> None:
        await self._close(pool, warm.allocation, warm.backend)

    async def _close(
        self,
        pool: _KindPool,
        allocation: Allocation,
        backend: Backend | None,
        *,
        used: bool = False,
    ) -> None:
        if backend is not None:
            backend.close()
        await in_turn_at_last(
            allocation, lambda: self._isolation.release(allocation, pool.request, used=used)
        )

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_open(warm: WarmConnection) -> bool:
    if warm.backend.server.at_eof or warm.allocation.outdated:
        return False
    # A client can stop the backend of another connection, which then never answers.
    key = warm.backend.login.key
    return key is None or not procfs.is_stopped(int.from_bytes(key[:4], "big"))


def _usable(warm: WarmConnection) -> bool:
    return _is_open(warm) and warm.allocation.usable


def _is_watched(startup: Startup) -> bool:
    """Whether the client's parameters may log statements, including those planned in advance."""
    words = [word for pair in startup.parameters.items() for word in pair]
    names = " ".join(words).lower().replace("-", "_")
    switches = startup.parameters.get("options", "")
    return any(name in names for name in WATCHING) or _SHORT_SWITCH.search(switches) is not None


def _kind(allocation_kind: Hashable, startup: Startup) -> Kind:
    parameters = frozenset(
        (name, value) for name, value in startup.parameters.items() if name != "database"
    )
    return allocation_kind, startup.version, parameters
