"""Connections opened ahead: a new database costs its first client no login.

A clone still costs whoever comes first a fork, a login and a cold start, which together take longer
than a connection to an old database. So for each kind of client that was seen (its supply and its
exact parameters), the next databases are connected to beforehand with the very packet such a client
would send, and what the server answered is kept; both are handed over when one comes. No setting is
emulated, as the packet is the same but for the database's name. What the last two of a kind began
with is planned as well, but not executed: suites begin each test alike, and so do drivers that ask
for the types there are.
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
from pgtemp.daemon.backend import Backend, connect, log_in, plan_ahead, prepare
from pgtemp.daemon.shares import in_turn_at_last
from pgtemp.errors import PgTempError
from pgtemp.sql.statement_logging import WATCHING
from pgtemp.wire.messages import ANY_PLAN, ProtocolError, in_read_only_transaction
from pgtemp.wire.startup import Startup

_log = logging.getLogger("pgtemp.daemon")
MOST_KINDS = 8  # of clients; those that were seen last
_IDLE_SECONDS = 60.0
_AFTER_SECONDS = 0.02
_PLAN_SECONDS = 1.0
_SHORT_SWITCH = re.compile(r"(^|\s)-[^c\s-]")  # of `postgres`, any but -c: -d and -s tell a lot

Kind = tuple[Hashable, int, frozenset[tuple[str, str]]]


@dataclass(slots=True)
class WarmConnection:
    """A database and a connection to it, as far as the end of the login."""

    allocation: Allocation
    backend: Backend


@dataclass(slots=True)
class _Stage:
    """What is ready for one kind of client.

    Attributes:
        begun: what plans the statement that the last one began with.
        plan: the same, if the one before began with it, too.
        unplanned: what could not be planned.
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
    """Connections for clients like those that were here."""

    def __init__(self, isolation: Isolation, *, ready: int) -> None:
        self._isolation = isolation
        self._wanted = ready
        self._stages: OrderedDict[Kind, _Stage] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, request: DatabaseRequest, startup: Startup) -> WarmConnection | None:
        """One for this client, where there is one; the next is begun in either case."""
        same_place = self._isolation.kind(request)
        if same_place is None or not self._wanted or database_request.names_session(startup):
            return None  # in the last case no other client sends the same packet
        kind = _kind(same_place, startup)
        stage = self._stages.setdefault(kind, _Stage(request, startup))
        self._stages.move_to_end(kind)
        stage.taken = asyncio.get_running_loop().time()
        if stage.expiry is None:
            self._expire_later(kind, stage, _IDLE_SECONDS)
        while len(self._stages) > MOST_KINDS:
            self._drop(next(iter(self._stages)))
        found = None
        while stage.ready and found is None:
            found = stage.ready.popleft()
            # That it is open says that its server runs; to ask would take as long as all the rest.
            # But others who join a session connect to the server anew.
            fit = _usable(found) if request.session is not None else _is_open(found)
            if not fit:
                self._do(self._give_back(stage, found))
                found = None
        if stage.seen:
            # The client that is here goes first: there are not that many cores.
            asyncio.get_running_loop().call_later(_AFTER_SECONDS, self._fill, kind, stage)
        stage.seen = True  # one that comes only once is not worth it
        return found

    def learn(self, request: DatabaseRequest, startup: Startup, plan: bytes) -> None:
        """Hear with what a client has begun; see wire/firststatement.py."""
        same_place = self._isolation.kind(request)
        stage = self._stages.get(_kind(same_place, startup)) if same_place is not None else None
        if stage is not None:
            stage.plan = plan if plan == stage.begun != stage.unplanned else b""
            stage.begun = plan

    def spare(self, request: DatabaseRequest) -> Allocation | None:
        """A place that was opened ahead for another kind of client, where none can be made.

        Where none would do, all that was opened ahead is given up, which makes room.
        """
        same_place = self._isolation.kind(request)
        for (place_kind, *_), stage in self._stages.items():
            if place_kind == same_place and stage.request.user == request.user:
                while stage.ready:
                    found = stage.ready.pop()
                    if _usable(found):
                        found.backend.close()
                        return found.allocation
                    self._do(self._give_back(stage, found))
        for kind in list(self._stages):
            self._drop(kind)
        return None

    def sweep(self) -> None:
        """Give back what can no longer be used, so that a server that nobody gets can end."""
        for stage in self._stages.values():
            for one in [one for one in stage.ready if not _usable(one)]:
                stage.ready.remove(one)
                self._do(self._give_back(stage, one))

    def _fill(self, kind: Kind, stage: _Stage) -> None:
        while len(stage.ready) + stage.making < self._wanted and not stage.refused:
            if self._stages.get(kind) is not stage:
                return
            stage.making += 1
            self._do(self._prepare(kind, stage))

    async def close(self) -> None:
        """Close all that was opened, and wait for what is under way."""
        for task in self._tasks:
            task.cancel()
        for kind in list(self._stages):
            self._drop(kind)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _drop(self, kind: Kind) -> None:
        stage = self._stages.pop(kind)
        if stage.expiry is not None:
            stage.expiry.cancel()
        while stage.ready:
            self._do(self._give_back(stage, stage.ready.popleft()))

    def _expire_later(self, kind: Kind, stage: _Stage, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        stage.expiry = loop.call_later(seconds, self._expire, kind, stage)

    def _expire(self, kind: Kind, stage: _Stage) -> None:
        """Drop what nobody has taken for a while."""
        left = stage.taken + _IDLE_SECONDS - asyncio.get_running_loop().time()
        if left > 0:
            self._expire_later(kind, stage, left)
        else:
            self._drop(kind)

    async def _prepare(self, kind: Kind, stage: _Stage) -> None:
        try:
            rehearsed = await self._rehearse(stage)
        except (PgTempError, ProtocolError, OSError) as error:
            _log.debug("could not be rehearsed: %s", error)
            return
        finally:
            stage.making -= 1
        if rehearsed is None:
            # The client that sends this is to hear it itself; the next minute may be another.
            stage.refused = True
        elif self._stages.get(kind) is stage:
            stage.ready.append(rehearsed)
        else:
            await self._give_back(stage, rehearsed)

    async def _rehearse(self, stage: _Stage) -> WarmConnection | None:
        allocation = await asyncio.wrap_future(self._isolation.claim(stage.request))
        backend: Backend | None = None
        busy = False
        try:
            dbname = await prepare(self._isolation, allocation, stage.request)
            backend = await connect(allocation, stage.startup, dbname, by_password=False)
            if await log_in(backend, allocation):
                watched = allocation.watched or _is_watched(stage.startup)
                busy = bool(stage.plan)  # it may be at it for ever
                if watched or await self._plan_ahead(stage, backend):
                    return WarmConnection(allocation, backend)
        except BaseException:
            await self._close(stage, allocation, backend, used=busy)
            raise
        await self._close(stage, allocation, backend)
        return None

    async def _plan_ahead(self, stage: _Stage, backend: Backend) -> bool:
        """Whether any statement could be planned; ProtocolError if what was learned could not."""
        plan = stage.plan
        if not plan:
            async with asyncio.timeout(_PLAN_SECONDS):
                return await plan_ahead(backend, ANY_PLAN)
        with suppress(TimeoutError):
            async with asyncio.timeout(_PLAN_SECONDS):
                if await plan_ahead(backend, in_read_only_transaction(plan)):
                    return True
        stage.plan, stage.unplanned = b"", plan
        raise ProtocolError("what clients begin with could not be planned ahead")

    async def _give_back(self, stage: _Stage, rehearsed: WarmConnection) -> None:
        await self._close(stage, rehearsed.allocation, rehearsed.backend)

    async def _close(
        self, stage: _Stage, allocation: Allocation, backend: Backend | None, *, used: bool = False
    ) -> None:
        if backend is not None:
            backend.close()
        await in_turn_at_last(
            allocation, lambda: self._isolation.release(allocation, stage.request, used=used)
        )

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _is_open(rehearsed: WarmConnection) -> bool:
    return not rehearsed.backend.server.over and not rehearsed.allocation.outdated


def _usable(rehearsed: WarmConnection) -> bool:
    return _is_open(rehearsed) and rehearsed.allocation.usable


def _is_watched(startup: Startup) -> bool:
    """Whether a client wants something that may tell of statements that are not its own."""
    said = [word for pair in startup.parameters.items() for word in pair]
    names = " ".join(said).lower().replace("-", "_")
    switches = startup.parameters.get("options", "")
    return any(name in names for name in WATCHING) or _SHORT_SWITCH.search(switches) is not None


def _kind(same_place: Hashable, startup: Startup) -> Kind:
    parameters = frozenset(
        (name, value) for name, value in startup.parameters.items() if name != "database"
    )
    return same_place, startup.version, parameters
