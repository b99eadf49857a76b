"""Leases: which clients share one, how long they wait for it, when it ends, how many there may be.

All code here runs on the event loop, so it needs no lock. A lease starts with its first connection.
It ends with its last connection, a session's `linger` seconds later, or at a time limit.
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
# How long a new client waits for the leak checks of leases that end.
_LEAK_CHECK_SECONDS = 2.0
_MIN_CONNECTIONS = 50  # of a server (max_connections), for warm connections


class Leases:
    """All leases of a daemon."""

    def __init__(self, isolation: Isolation, options: DaemonOptions) -> None:
        self._isolation = isolation
        self._options = options
        # Warm connections must not use up a small max_connections that clients need.
        limit = str(options.config.get("max_connections", _MIN_CONNECTIONS))
        few = limit.isdecimal() and int(limit) < _MIN_CONNECTIONS
        # And a client that must give a password cannot get a connection that is logged in.
        warm = not few and options.password_file is None
        self._warm_connections = WarmConnections(isolation, ready=options.pool if warm else 0)
        self._live: set[Lease] = set()
        self._shared: dict[Hashable, Lease] = {}
        self._numbers = itertools.count(1)
        most = options.max_databases
        self._turns = asyncio.Semaphore(most) if most is not None else None
        self._tasks: set[asyncio.Task[None]] = set()

    async def enter(self, request: DatabaseRequest, startup: Startup, client: Endpoint) -> Lease:
        """Return the lease for one more connection: a new one, or the one that it shares.

        Raises:
            RefusedError: no lease is available.
        """
        await self._await_leak_checks()
        await self._await_edits(request)
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
            if isinstance(error, OSError):  # of the allocation; not of the client's connection
                error = ClusterError(f"no database could be created: {error}")
            if isinstance(error, PgTempError):
                raise refusal(error) from error
            raise
        return lease

    async def leave(self, lease: Lease, client: Endpoint) -> None:
        """Remove a closed connection from its lease. After the last, the lease ends or lingers."""
        lease.clients.discard(client)
        lease.bytes_in += client.received
        lease.bytes_out += client.sent
        if lease.clients or lease.ending:
            return
        opened = lease.opening.done() and not lease.opening.cancelled()
        if (
            lease.lingers
            and opened
            and lease.opening.exception() is None
            and not lease.expired.done()
        ):
            loop = asyncio.get_running_loop()
            seconds = self._options.linger
            lease.timers[LINGER] = loop.call_later(seconds, self._end, lease)
        else:
            await self._end(lease)

    def record(self, lease: Lease, request: DatabaseRequest, startup: Startup, plan: bytes) -> None:
        """Record a client's first statement, if its database is new: only for a first client."""
        if lease.connections == 1:
            self._warm_connections.record(request, startup, plan)

    def facts(self) -> list[dict[str, Any]]:
        """Return the facts of each lease, in the order in which the leases started."""
        return [lease.facts() for lease in sorted(self._live, key=lambda lease: lease.number)]

    async def close(self) -> None:
        """End all leases. No client is connected any more."""
        await self._warm_connections.close()
        await asyncio.gather(*(self._end(lease) for lease in self._live))

    def _begin(self, request: DatabaseRequest, startup: Startup, key: Hashable) -> Lease:
        loop = asyncio.get_running_loop()
        lingers = key is not None and not request.edits and self._options.linger > 0
        expired, ended = loop.create_future(), loop.create_future()
        lease = Lease(next(self._numbers), request, key, lingers, expired, ended)
        lease.opening = self._opening(lease, startup)
        self._live.add(lease)
        if key is not None:
            self._shared[key] = lease
        return lease

    def _opening(self, lease: Lease, startup: Startup) -> asyncio.Future[Allocation]:
        """Return a future allocation; if one is ready, without creating a task.

        Creating a task would account for a tenth of the total time.
        """
        if self._turns is None and self._isolation.knows(lease.request):
            found = self._claim(lease, startup)
            if isinstance(found, Allocation):
                opened: asyncio.Future[Allocation] = asyncio.get_running_loop().create_future()
                opened.set_result(found)
                return opened
            return asyncio.ensure_future(self._await(lease, found))
        return asyncio.ensure_future(self._open(lease, startup))

    def _claim(self, lease: Lease, startup: Startup) -> Allocation | Future[Allocation]:
        """Take a warm connection, else an allocation that is ready, else claim the next one."""
        warm = self._warm_connections.take(lease.request, startup)
        if warm is not None:
            lease.backend = warm.backend
            return self._start(lease, warm.allocation)
        claimed = self._isolation.claim(lease.request)
        if claimed.done() and claimed.exception() is None:
            return self._start(lease, claimed.result())
        return claimed

    async def _open(self, lease: Lease, startup: Startup) -> Allocation:
        if self._turns is not None:
            await self._await_turn(self._turns)
        try:
            if not self._isolation.knows(lease.request):
                await whole(lambda: self._isolation.check(lease.request))
            found = self._claim(lease, startup)
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
                        return self._start(lease, await asyncio.wrap_future(claimed))
                    except PoolClosedError:  # the template was edited: it has a new pool
                        claimed = self._isolation.claim(lease.request)
                        if claimed.done():  # the daemon shuts down
                            return self._start(lease, claimed.result())
                    except PgTempError:
                        if (spare := self._warm_connections.spare(lease.request)) is None:
                            raise
                        return self._start(lease, spare)
        except TimeoutError:
            self._unclaim(claimed, lease.request)
            raise LimitError(
                f"no database became available within {seconds:g} s",
                remedy="try again later, or raise --wait",
            ) from None
        except BaseException:
            self._unclaim(claimed, lease.request)
            raise

    def _start(self, lease: Lease, allocation: Allocation) -> Allocation:
        """Assign the allocation to the lease, and start the lease's time limits."""
        allocation.lease(lease.number)
        lease.waited = time.perf_counter() - lease.requested_at
        loop = asyncio.get_running_loop()
        if (ttl := self._options.ttl) is not None:
            lease.timers["ttl"] = loop.call_later(ttl, self._expire, lease, f"ttl={ttl:g} s")
        if (idle := self._options.idle_ttl) is not None:
            lease.last_traffic = loop.time()
            lease.timers["idle"] = loop.call_later(idle / 4, self._watch, lease, idle, 0)
        return allocation

    def _unclaim(self, claimed: Future[Allocation], request: DatabaseRequest) -> None:
        """Cancel a claim; an allocation that arrives later is released."""

        def give_back(done: Future[Allocation]) -> None:
            if not done.cancelled() and done.exception() is None:
                self._isolation.release(done.result(), request, used=False)

        if not claimed.cancel():
            # In a thread of its own: the release blocks, and the loop may be closed by then.
            claimed.add_done_callback(
                lambda done: threading.Thread(target=give_back, args=(done,)).start()
            )

    async def _await_turn(self, turns: asyncio.Semaphore) -> None:
        try:
            async with asyncio.timeout(self._options.wait):
                await turns.acquire()
        except TimeoutError:
            raise LimitError(
                f"there were {self._options.max_databases} leases, which is the limit, for "
                f"{self._options.wait:g} s",
                remedy="close connections (a session's lease lingers), or raise --max-databases or "
                "--wait",
            ) from None

    def _end(self, lease: Lease) -> asyncio.Future[None]:
        """Start to end a lease; the returned future is done when its leak check is complete."""
        if not lease.ending:
            lease.ending = True
            task = asyncio.ensure_future(self._release(lease))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return asyncio.shield(lease.ended)

    async def _release(self, lease: Lease) -> None:
        for timer in lease.timers.values():
            timer.cancel()
        if not lease.request.edits:  # clients of an edited template wait until it is sealed
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
        except Exception as error:  # no other task observes it
            _log.error("lease %d: %s", lease.number, error)
        finally:
            if self._turns is not None:
                self._turns.release()
            self._warm_connections.sweep()
            self._log_lease(lease)

    def _forget(self, lease: Lease) -> None:
        if lease.key is not None and self._shared.get(lease.key) is lease:
            del self._shared[lease.key]

    def _expire(self, lease: Lease, limit: str) -> None:
        if not lease.expired.done():
            lease.expired.set_result(
                RefusedError("57P05", f"the database's time limit was reached ({limit})")
            )
        if not lease.clients:
            self._end(lease)

    def _watch(self, lease: Lease, seconds: float, before: int) -> None:
        """End a lease without traffic for `seconds`; check this four times in that period.

        Args:
            before: the traffic at the previous check.
        """
        loop = asyncio.get_running_loop()
        now = lease.traffic()
        if now != before:
            lease.last_traffic = loop.time()
        if loop.time() - lease.last_traffic >= seconds:
            self._expire(lease, f"idle_ttl={seconds:g} s")
        else:
            due = min(seconds / 4, lease.last_traffic + seconds - loop.time())
            lease.timers["idle"] = loop.call_later(due, self._watch, lease, seconds, now)

    async def _await_leak_checks(self) -> None:
        """Wait for the leak checks of leases that end, so that no client sees their leaks."""
        leaving = {lease.ended: lease for lease in self._live if lease.leaving and not lease.late}
        if leaving and self._options.shares_servers:
            _, late = await asyncio.wait(leaving, timeout=_LEAK_CHECK_SECONDS)
            for ended in late:
                leaving[ended].late = True  # the next client does not wait for it again
                if (lease := leaving[ended]).ending:
                    _log.warning(
                        "lease %d: its leak check was not complete within %g s; new leases go to "
                        "a new server",
                        lease.number,
                        _LEAK_CHECK_SECONDS,
                    )
                    lease.mark_stale()

    async def _await_edits(self, request: DatabaseRequest) -> None:
        """Wait while another client edits the requested template."""
        if request.edits or (request.dbname, TEMPLATE) not in self._shared:
            return
        seconds = self._options.wait
        _log.warning(
            "a client waits until the template %s is no longer edited: close all connections to "
            "%s~%s",
            request.dbname,
            request.dbname,
            TEMPLATE,
        )
        try:
            async with asyncio.timeout(seconds):
                while lease := self._shared.get((request.dbname, TEMPLATE)):
                    await asyncio.wait([lease.ended])
        except TimeoutError:
            raise refusal(
                NoDatabaseError(
                    f"the template {request.dbname} is still being edited after {seconds:g} s",
                    remedy=f"close all connections to {request.dbname}~{TEMPLATE} first",
                )
            ) from None

    def _log_lease(self, lease: Lease) -> None:
        """Log one line per lease."""
        facts = {**lease.facts(), "used": lease.used}
        _log.info(
            "lease %d: %s", lease.number,
            ", ".join(f"{name} {value}" for name, value in list(facts.items())[1:]
                      if value is not None),
            extra={"facts": facts},
        )  # fmt: skip
