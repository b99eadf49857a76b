"""Limits on the number of clients. A client above a limit is refused with an error.

Clients of other users get at most a quarter of the limit, whatever they send and however slowly
they send it. A client is a stranger until the listener has admitted it or its connection is closed.
While strangers hold a quarter of the limit, the listener checks each new client at accept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pgtemp.daemon.error_responses import RefusedError
from pgtemp.daemon.listeners import Listener
from pgtemp.daemon.relay import Endpoint
from pgtemp.host import file_limits

MAX_STARTING = 1000  # clients that have not completed the start-up
MORE_FILES = "raise the limit on open files (ulimit -n)"
_OWN_FILES = 48  # that the daemon has open without clients
_FILES_EACH = {"database": 2, "cluster": 5}  # open files per client and its lease, by isolation


class ClientLimits:
    """Counts clients, and refuses those above a limit.

    Attributes:
        starting: the number of clients that have not completed the start-up.
    """

    def __init__(self, isolation: str) -> None:
        self.starting = 0
        self._strangers: set[Endpoint] = set()
        self._served = 0
        self._most = max(2, (file_limits.limit() - _OWN_FILES) // _FILES_EACH[isolation])

    def enter(self, client: Endpoint, listener: Listener, inside: int) -> None:
        """Count a client that has just connected as starting, and as a stranger.

        Args:
            inside: the number of connected clients.

        Raises:
            RefusedError: a limit is reached, or the listener does not admit the client.
        """
        if self.starting >= MAX_STARTING:
            raise RefusedError("53300", "too many clients are starting", "connect again")
        _check_files(inside, self._most)
        self._strangers.add(client)
        if len(self._strangers) > min(MAX_STARTING, self._most) // 4:
            self.check(client, listener)
            if client.refusal is not None:
                self.leave(client)
                raise client.refusal
        self.starting += 1

    def check(self, client: Endpoint, listener: Listener) -> None:
        """Refuse the client, or stop counting it as a stranger; the listener is asked once."""
        if client in self._strangers and client.refusal is None:
            why = listener.refusal(client)
            if why is None:
                self.leave(client)
            else:
                client.refuse(why)

    def leave(self, client: Endpoint) -> None:
        """Stop counting the client as a stranger: it is admitted, or its connection is closed."""
        self._strangers.discard(client)

    @contextmanager
    def served(self) -> Iterator[None]:
        """Count one more client that has a database, while the block runs.

        An eighth of the limit is reserved for clients without a database, so that cancel requests
        and probes are still accepted.

        Raises:
            RefusedError: the limit is reached.
        """
        _check_files(self._served, self._most - self._most // 8)
        self._served += 1
        try:
            yield
        finally:
            self._served -= 1


def _check_files(clients: int, most: int) -> None:
    if clients >= most:
        reason = f"there are {clients} clients, and the limit on open files allows no more"
        raise RefusedError("53300", reason, MORE_FILES)
