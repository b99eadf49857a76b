"""How many clients there may be: who is too many is told so, not hung up on by the system."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pgtemp.daemon.refusals import RefusedError
from pgtemp.host import descriptors

MAX_STARTING = 1000  # clients that have not said yet who they are
MORE_FILES = "raise the limit on open files (ulimit -n)"
_OWN_FILES = 48  # that are open without a client
_FILES_EACH = {"database": 2, "cluster": 5}  # of a client, and of what it is given


class Crowd:
    """Counts clients.

    Attributes:
        starting: how many have not said yet who they are.
    """

    def __init__(self, isolation: str) -> None:
        self.starting = 0
        self._served = 0
        self._most = max(2, (descriptors.limit() - _OWN_FILES) // _FILES_EACH[isolation])

    def check_door(self, inside: int) -> None:
        """Raise RefusedError where nobody else can be listened to."""
        if self.starting >= MAX_STARTING:
            raise RefusedError("53300", "too many clients are starting", "connect again")
        _check_files(inside, self._most)

    @contextmanager
    def served(self) -> Iterator[None]:
        """While the block lasts there is one client more who has a database.

        Not all that have come can have one, so that who cancels, or looks in, finds room.
        """
        _check_files(self._served, self._most - self._most // 8)
        self._served += 1
        try:
            yield
        finally:
            self._served -= 1


def _check_files(clients: int, most: int) -> None:
    if clients >= most:
        reason = f"there are {clients} clients, and no files for more"
        raise RefusedError("53300", reason, MORE_FILES)
