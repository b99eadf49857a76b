"""Worker threads. Calls to one server may use only a few of them.

A call to a server blocks its thread until the server answers or the call's deadline has passed. If
one server could use all threads, its client would block all other clients. So a call waits for its
turn on the event loop, where a wait uses no thread and ends when the client disconnects.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pgtemp.aio import to_its_end, whole
from pgtemp.allocation.allocation import Allocation
from pgtemp.errors import ClusterError

T = TypeVar("T")
THREADS = 128  # of the daemon; the executor starts as many as are in use at once
_SHARE = 4  # threads per server; on two cores, more are no faster
_TURN_SECONDS = 10.0


@dataclass(slots=True)
class _Turns:
    """The turns of one server, and the number of calls that have a turn or wait for one."""

    free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_SHARE))
    calls: int = 0


_turns: dict[Path, _Turns] = {}  # by the server's run directory


async def in_turn(allocation: Allocation, do: Callable[[], T]) -> T:
    """Run `do`, a call to the server of an allocation, in a thread; see `aio.whole`.

    Raises:
        ClusterError: other calls occupied the server's threads for too long.
    """
    async with _turn(allocation, _TURN_SECONDS):
        return await whole(do)


async def in_turn_at_last(allocation: Allocation, do: Callable[[], T]) -> T:
    """Like `in_turn`, but the call has no deadline, and runs even if the task is cancelled."""
    waiting = asyncio.ensure_future(_without_deadline(allocation, do))
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        await to_its_end(waiting)
        raise


async def _without_deadline(allocation: Allocation, do: Callable[[], T]) -> T:
    async with _turn(allocation, None):
        return await asyncio.to_thread(do)


@asynccontextmanager
async def _turn(allocation: Allocation, seconds: float | None) -> AsyncIterator[None]:
    run_dir = allocation.postmaster.home.path
    turns = _turns.setdefault(run_dir, _Turns())
    turns.calls += 1
    try:
        await _acquire(turns.free, seconds)
        try:
            yield
        finally:
            turns.free.release()
    finally:
        turns.calls -= 1
        if not turns.calls:
            del _turns[run_dir]


async def _acquire(free: asyncio.Semaphore, seconds: float | None) -> None:
    try:
        async with asyncio.timeout(seconds):
            await free.acquire()
    except TimeoutError:
        raise ClusterError(
            f"the server did not answer earlier calls within {seconds:g} s", remedy="connect again"
        ) from None
