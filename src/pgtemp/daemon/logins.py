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
from types import TracebackType

from pgtemp.allocation.allocation import Allocation

LOGIN_SECONDS = 5.0
_LATE_SECONDS = 1.0  # if a timer is later than this, this process was stopped, not the server


class Login:
    """A block in which a server must complete a login.

    Raises:
        TimeoutError: the server does not; it is marked unreachable.
    """

    def __init__(self, allocation: Allocation) -> None:
        self._allocation = allocation
        self._limit = asyncio.timeout(None)
        self._began = time.monotonic()

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()
        self._check_in(LOGIN_SECONDS)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        try:
            await self._limit.__aexit__(kind, error, traceback)
        except TimeoutError as late:
            message = f"it completed no login for {LOGIN_SECONDS:g} s"
            raise TimeoutError(errno.ETIMEDOUT, message) from late
        if error is None:
            self._allocation.postmaster.let_in = time.monotonic()

    def _check_in(self, seconds: float) -> None:
        due = time.monotonic() + seconds
        self._timer = asyncio.get_running_loop().call_later(seconds, self._check, due)

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
