"""How many clients there may be: a client that is too many is refused with an error.

Clients of other users get at most a quarter of the room, whatever they send and however slowly they
send it. A client is a stranger until the door has admitted it or its connection is closed. While
strangers hold a quarter of the room, the door checks each new client at accept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pgtemp.daemon.error_responses import RefusedError
from pgtemp.host import file_limits

MAX_STARTING = 1000  # clients that have not said yet who they are
MORE_FILES = "raise the limit on open files (ulimit -n)"
_OWN_FILES = 48  # that are open without a client
_FILES_EACH = {"database": 2, "cluster": 5}  # of a client, and of what it is given


class ClientLimits:
    """Counts clients.

    Attributes:
        starting: how many have not said yet who they are.
    """

    def __init__(self, isolation: str) -> None:
        self.starting = 0
        self._strangers: set[Newcomer] = set()
        self._served = 0
        self._most = max(2, (file_limits.limit() - _OWN_FILES) // _FILES_EACH[isolation])

    def enter(self, refusal: Callable[[], RefusedError | None], inside: int) -> Newcomer:
        """Count a client that has just connected as one that starts.

        Args:
            refusal: asks the door why it does not admit the client; None if it does.
            inside: how many clients there are.

        Raises:
            RefusedError: the client is one too many, or the door does not admit it.
        """
        if self.starting >= MAX_STARTING:
            raise RefusedError("53300", "too many clients are starting", "connect again")
        _check_files(inside, self._most)
        newcomer = Newcomer(self._strangers, refusal)
        if len(self._strangers) > min(MAX_STARTING, self._most) // 4 and (why := newcomer.refusal):
            newcomer.leave()
            raise why
        self.starting += 1
        return newcomer

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


class Newcomer:
    """A client that has connected, a stranger so far."""

    def __init__(
        self, strangers: set[Newcomer], refusal: Callable[[], RefusedError | None]
    ) -> None:
        self._strangers = strangers
        self._strangers.add(self)
        self._ask = refusal
        self._asked = False
        self._refusal: RefusedError | None = None

    @property
    def refusal(self) -> RefusedError | None:
        """Why the door does not admit the client; None if it does. The door is asked once."""
        if not self._asked:
            self._asked = True
            self._refusal = self._ask()
            if self._refusal is None:
                self.leave()
        return self._refusal

    def leave(self) -> None:
        """The client is admitted, or its connection is closed."""
        self._strangers.discard(self)


def _check_files(clients: int, most: int) -> None:
    if clients >= most:
        reason = f"there are {clients} clients, and no files for more"
        raise RefusedError("53300", reason, MORE_FILES)
