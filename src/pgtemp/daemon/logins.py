"""Logins that a server does not answer.

If a server is stopped, or reads a pipe that a tenant put in place of one of its files, its socket
still takes connections, and nothing answers them. A server is unreachable if it has let no client
in for LOGIN_SECONDS while one waited: in a crowd, each waits for longer, but some are let in.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from pgtemp.databases.place import Place

LOGIN_SECONDS = 5.0
_LATE_SECONDS = 1.0  # of a timer. Then it was this process that stood still


class Login:
    """One client that waits to be let in.

    Args:
        give_up: called when the server is found to be unreachable.
    """

    def __init__(self, place: Place, give_up: Callable[[], object]) -> None:
        self._place, self._give_up = place, give_up
        self._since = time.monotonic()
        self._timer = self._look_in(LOGIN_SECONDS)

    def succeed(self) -> None:
        """Note that the server answers."""
        self._place.cluster.let_in = time.monotonic()
        self.cancel()

    def cancel(self) -> None:
        """Wait no longer."""
        self._timer.cancel()

    def _look_in(self, seconds: float) -> asyncio.TimerHandle:
        due = time.monotonic() + seconds
        return asyncio.get_running_loop().call_later(seconds, self._look, due)

    def _look(self, due: float) -> None:
        now = time.monotonic()
        left = max(self._since, self._place.cluster.let_in) + LOGIN_SECONDS - now
        if now > due + _LATE_SECONDS:
            left = LOGIN_SECONDS
        if left > 0:
            self._timer = self._look_in(left)
        else:
            self._place.forsake()
            self._give_up()


@asynccontextmanager
async def login(place: Place) -> AsyncIterator[None]:
    """A block in which a server answers a login. Raises TimeoutError if it does not."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as limit:
            waiting = Login(place, lambda: limit.reschedule(loop.time()))
            try:
                yield
                waiting.succeed()
            finally:
                waiting.cancel()
    except TimeoutError as error:
        raise unanswered() from error


def unanswered() -> TimeoutError:
    """The error for a server that lets no client in."""
    return TimeoutError(errno.ETIMEDOUT, f"it let no client in for {LOGIN_SECONDS:g} s")
