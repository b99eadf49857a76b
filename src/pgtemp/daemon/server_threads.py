"""Worker threads. Calls to one server may use only a few of them.

A call to a server blocks its thread until the server answers or the call's deadline has passed. If
one server could use all threads, its client would block all other clients. So a call waits for its
turn on the event loop, where a wait uses no thread and ends when the client disconnects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

from pgtemp.aio import to_its_end
from pgtemp.allocation.allocation import Allocation
from pgtemp.errors import ClusterError

T = TypeVar("T")
THREADS = 128  # of the daemon; the executor starts as many as are in use at once
_SHARE = 4  # threads per server; on two cores, more are no faster
_TURN_SECONDS = 10.0


class _Turns(asyncio.Semaphore):
    """The turns of one server, and the number of calls that have a turn or wait for one."""

    calls = 0


_turns: dict[Path, _Turns] = {}  # by the server's run directory


async def in_turn(
    allocation: Allocation, do: Callable[[], T], *, seconds: float | None = _TURN_SECONDS
) -> T:
    """Run `do`, a call to the server of an allocation, in a thread until it completes.

    Args:
        seconds: how long the call waits for its turn; None for no limit.

    Raises:
        ClusterError: other calls occupied the server's threads for that long.
    """
    run_dir = allocation.postmaster.home.path
    if (turns := _turns.get(run_dir)) is None:
        turns = _turns[run_dir] = _Turns(_SHARE)
    turns.calls += 1
    try:
        await _acquire(turns, seconds)
        try:
            return await _in_thread(do)
        finally:
            turns.release()
    finally:
        turns.calls -= 1
        if not turns.calls:
            del _turns[run_dir]


async def _acquire(turns: asyncio.Semaphore, seconds: float | None) -> None:
    try:
        async with asyncio.timeout(seconds) if turns.locked() else nullcontext():
            await turns.acquire()
    except TimeoutError:
        raise ClusterError(
            f"the server did not answer earlier calls within {seconds:g} s", remedy="connect again"
        ) from None


async def _in_thread(do: Callable[[], T]) -> T:
    """Like `aio.whole`, but without a task, which takes longer than the future of a thread."""
    working = asyncio.get_running_loop().run_in_executor(None, do)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await to_its_end(working)
        raise
