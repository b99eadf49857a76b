"""Logins that a server does not answer.

If a server is stopped, or reads a pipe that a tenant put in place of one of its files, its socket
still takes connections, and nothing answers them. A server is unreachable if it has let no client
in for LOGIN_SECONDS while one waited: in a crowd, each waits for longer, but some are let in.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pgtemp.allocation.allocation import Allocation

LOGIN_SECONDS = 5.0
_LATE_SECONDS = 1.0  # of a timer. Then it was this process that stood still


class _Watch:
    """A look, once a login is due, whether its server lets other clients in."""

    def __init__(self, allocation: Allocation, limit: asyncio.Timeout) -> None:
        self._place, self._limit = allocation, limit
        self._began = time.monotonic()
        self._look_in(LOGIN_SECONDS)

    def _look_in(self, seconds: float) -> None:
        due = time.monotonic() + seconds
        self.timer = asyncio.get_running_loop().call_later(seconds, self._look, due)

    def _look(self, due: float) -> None:
        now = time.monotonic()
        left = max(self._began, self._place.postmaster.let_in) + LOGIN_SECONDS - now
        if now > due + _LATE_SECONDS:
            left = LOGIN_SECONDS
        if left > 0:
            self._look_in(left)
        else:
            self._place.give_up()
            self._limit.reschedule(asyncio.get_running_loop().time())


@asynccontextmanager
async def login(allocation: Allocation) -> AsyncIterator[None]:
    """A block in which a server answers a login.

    Raises:
        TimeoutError: it does not; it counts as unreachable from now on.
    """
    try:
        async with asyncio.timeout(None) as limit:
            watch = _Watch(allocation, limit)
            try:
                yield
                allocation.postmaster.let_in = time.monotonic()
            finally:
                watch.timer.cancel()
    except TimeoutError as error:
        words = f"it let no client in for {LOGIN_SECONDS:g} s"
        raise TimeoutError(errno.ETIMEDOUT, words) from error
