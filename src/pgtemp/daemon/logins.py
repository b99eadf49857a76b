"""Detect logins that a server does not answer.

If a server is stopped, or blocks on a pipe that a client put in place of one of its files, its
socket still accepts connections, but the server does not answer them. A server is unreachable if
it completed no login for LOGIN_SECONDS while one was waiting: if many clients log in at once, each
may wait for longer, but some logins complete.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pgtemp.allocation.allocation import Allocation

LOGIN_SECONDS = 5.0
_LATE_SECONDS = 1.0  # if a timer is later than this, this process was stopped, not the server


class _Watch:
    """Checks, once a login has timed out, whether its server completes other logins."""

    def __init__(self, allocation: Allocation, limit: asyncio.Timeout) -> None:
        self._allocation, self._limit = allocation, limit
        self._began = time.monotonic()
        self._check_in(LOGIN_SECONDS)

    def _check_in(self, seconds: float) -> None:
        due = time.monotonic() + seconds
        self.timer = asyncio.get_running_loop().call_later(seconds, self._check, due)

    def _check(self, due: float) -> None:
        now = time.monotonic()
        left = max(self._began, self._allocation.postmaster.let_in) + LOGIN_SECONDS - now
        if now > due + _LATE_SECONDS:
            left = LOGIN_SECONDS
        if left > 0:
            self._check_in(left)
        else:
            self._allocation.give_up()
            self._limit.reschedule(asyncio.get_running_loop().time())


@asynccontextmanager
async def login(allocation: Allocation) -> AsyncIterator[None]:
    """Run a block in which a server must complete a login.

    Raises:
        TimeoutError: the server does not; it is marked unreachable.
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
        message = f"it completed no login for {LOGIN_SECONDS:g} s"
        raise TimeoutError(errno.ETIMEDOUT, message) from error
