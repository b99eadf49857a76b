"""A database whose changes are rolled back: for tests that are content with one connection.

What a test commits is the release of a savepoint in a transaction that never ends well. Sequences
go on, as always, and other connections see nothing of it.
"""

from __future__ import annotations

from typing import Any, LiteralString, Self

import psycopg
from psycopg import pq

from pgtemp.database import Database
from pgtemp.errors import OptionError

_SAVEPOINT = "pgtemp"
_NEW: LiteralString = f"SAVEPOINT {_SAVEPOINT}"
_COMMIT: LiteralString = f"RELEASE SAVEPOINT {_SAVEPOINT}; {_NEW}"
_ROLLBACK: LiteralString = f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}"


class RolledBack(Database):
    """A database of several tests, one after the other, of which none leaves anything.

    `connect()` gives the one connection of the test, however often it is called; in it `commit()`
    and `rollback()` do what they should as far as the test can see.
    """

    def __init__(self, base: Database) -> None:
        base._forget_ahead()
        super().__init__(base.works, base.dbname, base._pool)
        self._connection: psycopg.Connection[Any] | None = None
        self._async: psycopg.AsyncConnection[Any] | None = None
        self.seen = False  # whether anybody may have come by another way

    @property
    def uri(self) -> str:
        """The URL. What is changed by it is not rolled back; the database is then dropped."""
        self.seen = True
        return super().uri

    def connect(self, **kwargs: Any) -> psycopg.Connection[Any]:
        """The test's connection, in a transaction that is rolled back at its end.

        Raises:
            OptionError: with `autocommit`.
        """
        if self._connection is None:
            connection = _Connection.connect(self.info.uri, **_checked(kwargs))
            self.connections.append(connection)
            connection.execute(_NEW)
            self._connection = connection
        return self._connection

    async def aconnect(self, **kwargs: Any) -> psycopg.AsyncConnection[Any]:
        """As `connect`, for asyncio."""
        if self._async is None:
            connection = await _AsyncConnection.connect(self.info.uri, **_checked(kwargs))
            self.connections.append(connection)
            await connection.execute(_NEW)
            self._async = connection
        return self._async

    def close(self) -> None:
        """Roll back."""
        self.leave()


def _checked(kwargs: dict[str, Any]) -> dict[str, Any]:
    if kwargs.get("autocommit"):
        raise OptionError(
            "a test with rollback=True has no autocommit connections",
            remedy="leave rollback out for this test",
        )
    return kwargs


def _end_of(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> LiteralString:
    """What COMMIT does: where a statement has failed, that is a rollback."""
    failed = connection.pgconn.transaction_status == pq.TransactionStatus.INERROR
    return _ROLLBACK if failed else _COMMIT


class _Connection(psycopg.Connection[Any]):
    """A connection in which a commit is a savepoint's, and which is closed by pgtemp alone."""

    def commit(self) -> None:
        self.execute(_end_of(self))

    def rollback(self) -> None:
        self.execute(_ROLLBACK)

    def close(self) -> None:
        """The test may go on, or look at what it has done."""

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            self.commit()
        else:
            self.rollback()

    def __enter__(self) -> Self:
        return self


class _AsyncConnection(psycopg.AsyncConnection[Any]):
    async def commit(self) -> None:
        await self.execute(_end_of(self))

    async def rollback(self) -> None:
        await self.execute(_ROLLBACK)

    async def close(self) -> None:
        """As above."""

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            await self.commit()
        else:
            await self.rollback()

    async def __aenter__(self) -> Self:
        return self
