"""Leases: which clients share one, how long they wait for it, when it ends, how many there may be.

All code here runs on the event loop, so it needs no lock. A lease starts with its first connection.
It ends with its last connection, a session's `linger` seconds later, or at a time limit.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import Hashable
from concurrent.futures import Future
from typing import Any

from pgtemp.aio import whole
from pgtemp.allocation.allocation import Allocation
from pgtemp.allocation.isolation import TEMPLATE, DatabaseRequest, Isolation
from pgtemp.allocation.pool import PoolClosedError
from pgtemp.daemon.lease import LINGER, Lease
from pgtemp.daemon.relay import Endpoint
from pgtemp.daemon.server_threads import in_turn
from pgtemp.daemon.warm_connections import WarmConnections
from pgtemp.errors import ClusterError, LimitError, NoDatabaseError, PgTempError
from pgtemp.options.daemon import DaemonOptions
from pgtemp.wire.startup import Startup

_log = logging.getLogger("pgtemp.daemon")
# How long a new client waits for the leak checks of leases that end.
_LEAK_CHECK_SECONDS = 2.0


class Leases:
    """All leases of a daemon."""

    def __init__(self, isolation: Isolation, options: DaemonOptions) -> None:
        self._isolation = isolation
        self._options = options
        self._warm_connections = WarmConnections(isolation, options)
        self._live: set[Lease] = set()
        self._shared: dict[Hashable, Lease] = {}
        self._numbers = itertools.count(1)
        most = options.max_databases
        self._turns = asyncio.Semaphore(most) if most is not None else None

    async def enter(self, request: DatabaseRequest, startup: Startup, client: Endpoint) -> Lease:
        """Return the lease for one more connection: a new one, or the one that it shares.

        Raises:
            PgTempError: no lease is available.
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
            raise LimitError(
                f"session {request.session} has {most} connections, which is the limit",
                remedy="close some, or raise --max-connections-per-lease",
            )
        lease.clients.add(client)
        if lease.expired is not None:
            client.refuse(lease.expired)
        lease.connections += 1
        if (lingering := lease.timers.pop(LINGER, None)) is not None:
            lingering.cancel()
        if lease.opening is not None:
            try:
                await asyncio.shield(lease.opening)
            except BaseException as error:
                await self.leave(lease, client)
                if isinstance(error, OSError):  # of the allocation; not of the client's connection
                    raise ClusterError(f"no database could be created: {error}") from error
                raise
        return lease

    async def leave(self, lease: Lease, client: Endpoint) -> None:
        """Remove a closed connection from its lease. After the last, the lease ends or lingers."""
        lease.clients.discard(client)
        lease.bytes_in += client.received
        lease.bytes_out += client.sent
        if lease.clients or lease.ending:
            return
        if lease.lingers and lease.opened is not None and lease.expired is None:
            loop = asyncio.get_running_loop()
            lease.timers[LINGER] = loop.call_later(self._options.linger, self._end, lease)
        else:
            await self._end(lease)

    def facts(self) -> list[dict[str, Any]]:
        """Return the facts of each lease, in the order in which the leases started."""
        return [lease.facts() for lease in sorted(self._live, key=lambda lease: lease.number)]

    async def close(self) -> None:
        """End all leases. No client is connected any more."""
        await self._warm_connections.close()
        await asyncio.gather(*(self._end(lease) for lease in self._live))

    def _begin(self, request: DatabaseRequest, startup: Startup, key: Hashable) -> Lease:
        ended = asyncio.get_running_loop().create_future()
        lingers = key is not None and not request.edits and self._options.linger > 0
        lease = Lease(next(self._numbers), request, key, lingers, ended, self._end)
        self._live.add(lease)
        if key is not None:
            self._shared[key] = lease
        claimed = None
        if self._turns is None and self._isolation.knows(request):
            claimed = self._claim(lease, startup)
        if lease.opened is None:  # creating a task would account for a tenth of the total time
            lease.opening = asyncio.ensure_future(self._open(lease, startup, claimed))
        return lease

    def _claim(self, lease: Lease, startup: Startup) -> Future[Allocation] | None:
        """Give the lease a warm connection or an allocation that is ready; else claim the next."""
        lease.kind = self._warm_connections.kind(lease.request, startup)
        if lease.kind is not None:
            # Later clients of a session open new connections to the server.
            warm = lease.kind.take(lasting=lease.request.session is not None)
            if warm is not None:
                lease.backend = warm.backend
                lease.start(warm.allocation, self._options)
                return None
        claimed = self._isolation.claim(lease.request)
        if not claimed.done() or claimed.exception() is not None:
            return claimed
        lease.start(claimed.result(), self._options)
        return None

    async def _open(
        self, lease: Lease, startup: Startup, claimed: Future[Allocation] | None
    ) -> None:
        """Wait for a turn, and until the lease has an allocation. Raises PgTempError."""
        if self._turns is not None:
            await self._await_turn(self._turns)
        try:
            if claimed is None:
                if not self._isolation.knows(lease.request):
                    await whole(lambda: self._isolation.check(lease.request))
                claimed = self._claim(lease, startup)
            if claimed is not None:
                await self._await(lease, claimed)
        except BaseException:
            if self._turns is not None:
                self._turns.release()
            raise

    async def _await(self, lease: Lease, claimed: Future[Allocation]) -> None:
        seconds = self._options.wait
        try:
            async with asyncio.timeout(seconds):
                while lease.opened is None:
                    try:
                        lease.start(await asyncio.wrap_future(claimed), self._options)
                    except PoolClosedError:  # the template was edited: it has a new pool
                        claimed = self._isolation.claim(lease.request)
                        if claimed.done():  # the daemon shuts down
                            lease.start(claimed.result(), self._options)
                    except PgTempError:
                        if (spare := self._warm_connections.spare(lease.request)) is None:
                            raise
                        lease.start(spare, self._options)
        except BaseException as error:
            self._unclaim(claimed, lease.request)
            if isinstance(error, TimeoutError):
                raise LimitError(
                    f"no database became available within {seconds:g} s",
                    remedy="try again later, or raise --wait",
                ) from None
            raise

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
        if lease.ending is None:
            lease.ending = asyncio.ensure_future(self._release(lease))
        return asyncio.shield(lease.ended)

    async def _release(self, lease: Lease) -> None:
        """Give the allocation back. Nothing cancels this task."""
        for timer in lease.timers.values():
            timer.cancel()
        if not lease.request.edits:  # clients of an edited template wait until it is sealed
            self._forget(lease)
        try:
            if lease.opening is not None:
                lease.opening.cancel()
                await asyncio.wait([lease.opening])
            if lease.opened is not None:
                await self._give_back(lease, lease.opened)
        finally:
            self._forget(lease)
            self._live.discard(lease)
            lease.ended.set_result(None)

    async def _give_back(self, lease: Lease, allocation: Allocation) -> None:
        try:
            await in_turn(
                allocation,
                lambda: self._isolation.release(allocation, lease.request, used=lease.used),
                seconds=None,
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

    async def _await_leak_checks(self) -> None:
        """Wait for the leak checks of leases that end, so that no client sees their leaks."""
        if not self._options.shares_servers:
            return
        leaving = {lease.ended: lease for lease in self._live if not lease.late and lease.leaving}
        if not leaving:
            return
        _, late = await asyncio.wait(leaving, timeout=_LEAK_CHECK_SECONDS)
        for lease in (leaving[ended] for ended in late):
            lease.late = True  # the next client does not wait for it again
            if lease.ending is not None:
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
            raise NoDatabaseError(
                f"the template {request.dbname} is still being edited after {seconds:g} s",
                remedy=f"close all connections to {request.dbname}~{TEMPLATE} first",
            ) from None

    def _log_lease(self, lease: Lease) -> None:
        """Log one line per lease."""
        if _log.isEnabledFor(logging.INFO):
            facts = {**lease.facts(), "used": lease.used}
            shown = [f"{name} {value}" for name, value in facts.items() if value is not None]
            _log.info("lease %d: %s", lease.number, ", ".join(shown[1:]), extra={"facts": facts})
