"""Who holds what: sharing, waiting one's turn, lingering, deadlines, limits.

All on the event loop, so that nothing here needs a lock. A lease begins with its first connection
and ends with its last, a session's `linger` seconds later; or when its time is over.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Hashable
from concurrent.futures import Future
from typing import Any

from pgtemp.aio import whole
from pgtemp.allocation.allocation import Allocation
from pgtemp.allocation.isolation import TEMPLATE, DatabaseRequest, Isolation
from pgtemp.allocation.pool import PoolClosedError
from pgtemp.daemon.error_responses import RefusedError, refusal
from pgtemp.daemon.lease import LINGER, Lease
from pgtemp.daemon.relay import Endpoint
from pgtemp.daemon.shares import in_turn_at_last
from pgtemp.daemon.warm_connections import WarmConnections
from pgtemp.errors import ClusterError, LimitError, NoDatabaseError, PgTempError
from pgtemp.options.daemon import DaemonOptions
from pgtemp.wire.startup import Startup

_log = logging.getLogger("pgtemp.daemon")
# How long somebody new waits for what others who have gone may have left to be found.
_LOOK_SECONDS = 2.0
_ENOUGH = 50  # connections of a server, for some to be opened ahead


class Leases:
    """All leases of a daemon."""

    def __init__(self, isolation: Isolation, options: DaemonOptions) -> None:
        self._isolation = isolation
        self._options = options
        # Connections that nobody has yet must not take the places of those that somebody wants.
        said = str(options.config.get("max_connections", _ENOUGH))
        few = said.isdecimal() and int(said) < _ENOUGH
        # And a connection that is logged in is not for somebody who has yet to say a password.
        ahead = not few and options.password_file is None
        self._rehearsals = WarmConnections(isolation, ready=options.pool if ahead else 0)
        self._live: set[Lease] = set()
        self._shared: dict[Hashable, Lease] = {}
        self._numbers = itertools.count(1)
        limit = options.max_databases
        self._turns = asyncio.Semaphore(limit) if limit is not None else None
        self._tasks: set[asyncio.Task[None]] = set()

    async def enter(self, request: DatabaseRequest, startup: Startup, client: Endpoint) -> Lease:
        """A lease for one more connection: a new one, or the one that it shares.

        Raises:
            RefusedError: there is none to be had.
        """
        await self._what_is_left()
        await self._while_edited(request)
        key = self._isolation.share(request)
        while (lease := self._shared.get(key)) is not None and (lease.ending or lease.dead):
            await self._end(lease)
        most = self._options.max_connections_per_lease
        if lease is None:
            lease = self._begin(request, startup, key)
        elif most is not None and len(lease.clients) >= most:
            raise refusal(
                LimitError(
                    f"session {request.session} has {most} connections, which is the limit",
                    remedy="close some, or raise --max-connections-per-lease",
                )
            )
        lease.clients.add(client)
        lease.connections += 1
        if (lingering := lease.timers.pop(LINGER, None)) is not None:
            lingering.cancel()
        try:
            if not lease.opening.done():
                await asyncio.shield(lease.opening)
            lease.opening.result()
        except BaseException as error:
            await self.leave(lease, client)
            if isinstance(error, OSError):  # of making a place; not the client's connection
                error = ClusterError(f"no database could be made: {error}")
            if isinstance(error, PgTempError):
                raise refusal(error) from error
            raise
        return lease

    async def leave(self, lease: Lease, client: Endpoint) -> None:
        """A connection has ended; with the last one ends the lease, or begins to linger."""
        lease.clients.discard(client)
        lease.bytes_in += client.received
        lease.bytes_out += client.sent
        if lease.clients or lease.ending:
            return
        opened = lease.opening.done() and not lease.opening.cancelled()
        if lease.lingers and opened and lease.opening.exception() is None and not lease.over.done():
            loop = asyncio.get_running_loop()
            seconds = self._options.linger
            lease.timers[LINGER] = loop.call_later(seconds, self._end, lease)
        else:
            await self._end(lease)

    def learn(self, lease: Lease, request: DatabaseRequest, startup: Startup, plan: bytes) -> None:
        """Hear with what a client has begun; only the first of a session finds a new database."""
        if lease.connections == 1:
            self._rehearsals.learn(request, startup, plan)

    def facts(self) -> list[dict[str, Any]]:
        """What there is to tell of each lease that there is, in the order in which they began."""
        return [lease.facts() for lease in sorted(self._live, key=lambda one: one.number)]

    async def close(self) -> None:
        """End all leases; nobody is connected any more."""
        await self._rehearsals.close()
        await asyncio.gather(*(self._end(lease) for lease in self._live))

    def _begin(self, request: DatabaseRequest, startup: Startup, key: Hashable) -> Lease:
        loop = asyncio.get_running_loop()
        lingers = key is not None and not request.edits and self._options.linger > 0
        over, ended = loop.create_future(), loop.create_future()
        lease = Lease(next(self._numbers), request, key, lingers, over, ended)
        lease.opening = self._opening(lease, startup)
        self._live.add(lease)
        if key is not None:
            self._shared[key] = lease
        return lease

    def _opening(self, lease: Lease, startup: Startup) -> asyncio.Future[Allocation]:
        """A place, or one to come. Where nothing has to be waited for, there is no task.

        A task would take a tenth of the time.
        """
        if self._turns is None and self._isolation.knows(lease.request):
            found = self._at_once(lease, startup)
            if isinstance(found, Allocation):
                opened: asyncio.Future[Allocation] = asyncio.get_running_loop().create_future()
                opened.set_result(found)
                return opened
            return asyncio.ensure_future(self._await(lease, found))
        return asyncio.ensure_future(self._open(lease, startup))

    def _at_once(self, lease: Lease, startup: Startup) -> Allocation | Future[Allocation]:
        """What was opened ahead, else what is ready, else what will be."""
        rehearsed = self._rehearsals.take(lease.request, startup)
        if rehearsed is not None:
            lease.backend = rehearsed.backend
            return self._give(lease, rehearsed.allocation)
        claimed = self._isolation.claim(lease.request)
        if claimed.done() and claimed.exception() is None:
            return self._give(lease, claimed.result())
        return claimed

    async def _open(self, lease: Lease, startup: Startup) -> Allocation:
        if self._turns is not None:
            await self._turn(self._turns)
        try:
            if not self._isolation.knows(lease.request):
                await whole(lambda: self._isolation.check(lease.request))
            found = self._at_once(lease, startup)
            return found if isinstance(found, Allocation) else await self._await(lease, found)
        except BaseException:
            if self._turns is not None:
                self._turns.release()
            raise

    async def _await(self, lease: Lease, claimed: Future[Allocation]) -> Allocation:
        seconds = self._options.wait
        try:
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        return self._give(lease, await asyncio.wrap_future(claimed))
                    except PoolClosedError:  # the template was edited: it has a new pool
                        claimed = self._isolation.claim(lease.request)
                        if claimed.done():  # the daemon ends
                            return self._give(lease, claimed.result())
                    except PgTempError:
                        if (spare := self._rehearsals.spare(lease.request)) is None:
                            raise
                        return self._give(lease, spare)
        except TimeoutError:
            self._unclaim(claimed, lease.request)
            raise LimitError(
                f"no database became free within {seconds:g} s",
                remedy="try again later, or raise --wait",
            ) from None
        except BaseException:
            self._unclaim(claimed, lease.request)
            raise

    def _give(self, lease: Lease, allocation: Allocation) -> Allocation:
        allocation.lease(lease.number)
        lease.waited = time.perf_counter() - lease.asked
        loop = asyncio.get_running_loop()
        if (ttl := self._options.ttl) is not None:
            lease.timers["ttl"] = loop.call_later(ttl, self._expire, lease, f"ttl={ttl:g} s")
        if (idle := self._options.idle_ttl) is not None:
            lease.spoke = loop.time()
            lease.timers["idle"] = loop.call_later(idle / 4, self._watch, lease, idle, 0)
        return allocation

    def _unclaim(self, claimed: Future[Allocation], request: DatabaseRequest) -> None:
        """What comes too late goes back."""

        def give_back(done: Future[Allocation]) -> None:
            if not done.cancelled() and done.exception() is None:
                self._isolation.release(done.result(), request, used=False)

        if not claimed.cancel():
            # In a thread of its own: it blocks, and the loop may be closed by then.
            claimed.add_done_callback(
                lambda done: threading.Thread(target=give_back, args=(done,)).start()
            )

    async def _turn(self, turns: asyncio.Semaphore) -> None:
        try:
            async with asyncio.timeout(self._options.wait):
                await turns.acquire()
        except TimeoutError:
            raise LimitError(
                f"there were {self._options.max_databases} leases, which is the limit, for "
                f"{self._options.wait:g} s",
                remedy="close connections (sessions linger), or raise --max-databases or --wait",
            ) from None

    def _end(self, lease: Lease) -> asyncio.Future[None]:
        """Begin to end a lease; done, whoever waits for it, when what it left was looked at."""
        if not lease.ending:
            lease.ending = True
            task = asyncio.ensure_future(self._release(lease))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return asyncio.shield(lease.ended)

    async def _release(self, lease: Lease) -> None:
        for timer in lease.timers.values():
            timer.cancel()
        if not lease.request.edits:  # who wants what is being edited waits until it is sealed
            self._forget(lease)
        lease.opening.cancel()
        try:
            await asyncio.wait([lease.opening])
            if not lease.opening.cancelled() and lease.opening.exception() is None:
                await self._give_back(lease)
        finally:
            self._forget(lease)
            self._live.discard(lease)
            lease.ended.set_result(None)

    async def _give_back(self, lease: Lease) -> None:
        try:
            await in_turn_at_last(
                lease.allocation,
                lambda: self._isolation.release(lease.allocation, lease.request, used=lease.used),
            )
        except Exception as error:  # no other task is told of it
            _log.error("lease %d: %s", lease.number, error)
        finally:
            if self._turns is not None:
                self._turns.release()
            self._rehearsals.sweep()
            self._tell(lease)

    def _forget(self, lease: Lease) -> None:
        if lease.key is not None and self._shared.get(lease.key) is lease:
            del self._shared[lease.key]

    def _expire(self, lease: Lease, why: str) -> None:
        if not lease.over.done():
            lease.over.set_result(RefusedError("57P05", f"the database's time is over ({why})"))
        if not lease.clients:
            self._end(lease)

    def _watch(self, lease: Lease, seconds: float, before: int) -> None:
        """End a lease in which nothing was said for so long; looked at in quarters of that."""
        loop = asyncio.get_running_loop()
        now = lease.traffic()
        if now != before:
            lease.spoke = loop.time()
        if loop.time() - lease.spoke >= seconds:
            self._expire(lease, f"idle_ttl={seconds:g} s")
        else:
            due = min(seconds / 4, lease.spoke + seconds - loop.time())
            lease.timers["idle"] = loop.call_later(due, self._watch, lease, seconds, now)

    async def _what_is_left(self) -> None:
        """Wait until what those who have gone left in the server was found."""
        leaving = {lease.ended: lease for lease in self._live if lease.leaving and not lease.late}
        if leaving and self._options.shares_servers:
            _, late = await asyncio.wait(leaving, timeout=_LOOK_SECONDS)
            for ended in late:
                leaving[ended].late = True  # the next client does not wait for it again
                if (lease := leaving[ended]).ending:
                    _log.warning("lease %d: what it left is not known in time", lease.number)
                    lease.distrust()

    async def _while_edited(self, request: DatabaseRequest) -> None:
        """Wait while somebody edits the template that is wanted."""
        if request.edits or (request.dbname, TEMPLATE) not in self._shared:
            return
        seconds = self._options.wait
        _log.warning("a client waits for %s~%s, which is open", request.dbname, TEMPLATE)
        try:
            async with asyncio.timeout(seconds):
                while lease := self._shared.get((request.dbname, TEMPLATE)):
                    await asyncio.wait([lease.ended])
        except TimeoutError:
            raise refusal(
                NoDatabaseError(
                    f"the template {request.dbname} is being edited still after {seconds:g} s",
                    remedy=f"close all connections to {request.dbname}~{TEMPLATE} first",
                )
            ) from None

    def _tell(self, lease: Lease) -> None:
        """One line a lease."""
        facts = {**lease.facts(), "used": lease.used}
        _log.info(
            "lease %d: %s", lease.number,
            ", ".join(f"{name} {value}" for name, value in list(facts.items())[1:]
                      if value is not None),
            extra={"facts": facts},
        )  # fmt: skip
