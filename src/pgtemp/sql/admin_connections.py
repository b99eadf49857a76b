"""pgtemp's administrative connections to a server: one open connection per working thread."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from psycopg import errors

from pgtemp.errors import ClusterError, PgTempError
from pgtemp.sql.connection import Connection, cluster_errors, connect, has_unread_input, was_lost
from pgtemp.sql.timeouts import NoAnswerError
from pgtemp.uri import ConnectionInfo

# Takes precedence over ALTER ROLE and ALTER DATABASE ... SET: objects that a client created in the
# maintenance database must not replace the system catalogs and their functions.
_CATALOGS_ONLY = "-c search_path=pg_catalog"
# The number of calls of `check` after a connection broke, and their interval in seconds: the
# supervisor may need this time to report that the server has exited.
_CRASH_CHECKS, _CRASH_CHECK_SECONDS = 20, 0.01


class AdminConnections:
    """Administrative connections that stay open, one per working thread.

    Args:
        check: raises if the server has exited; its error is more informative than psycopg's.

    Attributes:
        unanswered: whether the server has failed to answer on one of the connections in time.
        closing: set when the connections are closed.
    """

    def __init__(self, to: ConnectionInfo, check: Callable[[], None]) -> None:
        self._to = to
        self._check = check
        self._idle: deque[Connection] = deque()
        self._owner = os.getpid()
        self.unanswered = False
        self.closing = threading.Event()

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Return a connection for a `with` block; a broken one is not used again.

        Raises the errors of `connected`.
        """
        if self._owner != os.getpid():
            raise ClusterError(
                "the cluster belongs to the process that this one was forked from",
                remedy="create one in this process",
            )
        with self._crash_errors(), cluster_errors(self._to):
            connection = self._get()
            try:
                yield connection
            finally:
                if connection.broken or self.closing.is_set():
                    connection.close()
                else:
                    self._idle.append(connection)

    @contextmanager
    def _crash_errors(self) -> Iterator[None]:
        """If the server has exited, raise the error of `check` instead of psycopg's."""
        try:
            yield
        except ClusterError as error:
            cause = error.__cause__
            self.unanswered |= isinstance(cause, NoAnswerError | errors.LockNotAvailable)
            for _ in range(_CRASH_CHECKS if was_lost(cause) else 0):
                try:
                    self._check()
                except PgTempError as crash:
                    raise crash from error
                self.closing.wait(_CRASH_CHECK_SECONDS)
            raise

    def _get(self) -> Connection:
        """Return an open connection: an idle one, or a new one.

        An idle connection may be closed, because tests often terminate all other backends of the
        server.
        """
        while self._idle:
            connection = self._idle.pop()
            if not has_unread_input(connection):
                return connection
            connection.close()
        return connect(self._to, options=_CATALOGS_ONLY)

    def info_of(self, dbname: str) -> ConnectionInfo:
        """Return the connection parameters for another database of the same server."""
        to = self._to
        return ConnectionInfo(host=to.host, port=to.port, user=to.user, dbname=dbname)

    def close(self) -> None:
        self.closing.set()
        while self._idle:
            self._idle.pop().close()
