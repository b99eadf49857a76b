"""A database whose changes are rolled back, for tests that need only one connection.

A commit in the test releases a savepoint in a transaction that is later rolled back. As after any
rollback, sequences are not reset. Other connections do not see the changes of the test.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, LiteralString, NoReturn, Self

import psycopg
from psycopg import pq

from pgtemp import libpq
from pgtemp.database import Database
from pgtemp.errors import OptionError

_NEW: LiteralString = "SAVEPOINT pgtemp"
_COMMIT: LiteralString = f"RELEASE SAVEPOINT pgtemp; {_NEW}"
_ROLLBACK: LiteralString = "ROLLBACK TO SAVEPOINT pgtemp"
_SETTABLE = ("row_factory", "cursor_factory", "prepare_threshold")


class RolledBack(Database):
    """A database that several tests use one after another, and whose changes are rolled back.

    Changes through its URL are not rolled back; if a test reads the URL, the database is dropped.

    `connect()` returns the test's only connection, however often it is called. For the test,
    `commit()`, `rollback()`, `transaction()` and autocommit behave as usual.
    """

    def __init__(self, base: Database, bases: list[Database]) -> None:
        """Use `base` for one test.

        Args:
            base: the real database.
            bases: the list to which it is returned for the next test, unless this test has changed
                it.
        """
        base._close_warm()
        super().__init__(base._server, base.shared, base._pool, base.dbname, is_clone=False)
        self._base, self._bases = base, bases
        self._one: _Connection | _AsyncConnection | None = None

    def connect(self, **kwargs: Any) -> psycopg.Connection[Any]:
        """Return the test's connection, in a transaction that is rolled back after the test.

        Raises:
            OptionError: the test has an asynchronous connection, or one with other arguments.
        """
        auto = bool(kwargs.pop("autocommit", False))
        if self._one is None:
            self._one = libpq.connect(_Connection, self._info, kwargs)
            self.connections.append(self._one)
            self._one._begin(auto)
        elif not isinstance(self._one, _Connection):
            raise _of_two_kinds()
        else:
            _set(self._one, auto, kwargs)
        return self._one

    async def aconnect(self, **kwargs: Any) -> psycopg.AsyncConnection[Any]:
        """Like `connect`, for asyncio."""
        auto = bool(kwargs.pop("autocommit", False))
        if self._one is None:
            self._one = await libpq.aconnect(_AsyncConnection, self._info, kwargs)
            self.connections.append(self._one)
            await self._one._begin(auto)
        elif not isinstance(self._one, _AsyncConnection):
            raise _of_two_kinds()
        else:
            _set(self._one, auto, kwargs)
        return self._one

    def close(self) -> None:
        """Roll back. If changes may remain, the database is dropped."""
        if self.closed:
            return
        clean = not self.was_shown and (self._one is None or self._one._is_whole())
        self.leave()
        for snapshot in self._snapshots:
            self._pool.retire(snapshot.dbname)
        if clean:
            self._bases.append(self._base)
        else:
            self._base.close()


def _of_two_kinds() -> OptionError:
    return OptionError(
        "a test with rollback=True has one connection, and this test has one of the other kind",
        remedy="use only connect() or only aconnect(), or omit rollback for this test",
    )


def _set(connection: _State, auto: bool, kwargs: dict[str, Any]) -> None:
    if connection.autocommit != auto:
        connection.autocommit = auto
    for name, value in kwargs.items():
        if name not in _SETTABLE:
            raise OptionError(
                f"a test with rollback=True has one connection; it cannot have another {name}",
                remedy="specify it in the first connect(), or omit rollback for this test",
            )
        setattr(connection, name, value)


class _Cursor(psycopg.Cursor[Any]):
    connection: _Connection

    def execute(self, *args: Any, **kwargs: Any) -> Self:
        with self.connection._statement():
            return super().execute(*args, **kwargs)

    def executemany(self, *args: Any, **kwargs: Any) -> None:
        with self.connection._statement():
            super().executemany(*args, **kwargs)

    @contextmanager
    def copy(self, *args: Any, **kwargs: Any) -> Iterator[psycopg.Copy]:
        with self.connection._statement(), super().copy(*args, **kwargs) as copy:
            yield copy


class _AsyncCursor(psycopg.AsyncCursor[Any]):
    connection: _AsyncConnection

    async def execute(self, *args: Any, **kwargs: Any) -> Self:
        async with self.connection._statement():
            return await super().execute(*args, **kwargs)

    async def executemany(self, *args: Any, **kwargs: Any) -> None:
        async with self.connection._statement():
            await super().executemany(*args, **kwargs)

    @asynccontextmanager
    async def copy(self, *args: Any, **kwargs: Any) -> AsyncIterator[psycopg.AsyncCopy]:
        async with self.connection._statement(), super().copy(*args, **kwargs) as copy:
            yield copy


class _State:
    """The state that a connection would have if its transactions were real."""

    pgconn: pq.abc.PGconn
    _auto = False
    _begun = False  # whether the test is in a transaction

    @property
    def autocommit(self) -> bool:
        return self._auto

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self._set_auto(value)

    def _set_auto(self, value: bool) -> None:
        if self._begun:
            raise psycopg.ProgrammingError(
                "can't change 'autocommit' now: connection in transaction status INTRANS"
            )
        self._auto = bool(value)

    def _set_isolation_level(self, value: object) -> NoReturn:
        raise OptionError(
            "a test with rollback=True has one transaction, whose isolation level cannot change",
            remedy="omit rollback for this test",
        )

    def _is_whole(self) -> bool:
        """Whether the outer transaction is still open; an explicit COMMIT statement ends it."""
        ended = self.pgconn.exec_(_ROLLBACK.encode())
        return ended.status == pq.ExecStatus.COMMAND_OK

    def _end(self) -> LiteralString:
        """Return the statement for a commit: a rollback if a statement has failed."""
        failed = self.pgconn.transaction_status == pq.TransactionStatus.INERROR
        return _ROLLBACK if failed else _COMMIT


class _Connection(_State, psycopg.Connection[Any]):
    """A connection that commits by a savepoint, and that only pgtemp closes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cursor_factory = _Cursor

    def _begin(self, auto: bool) -> None:
        self._do(_NEW)
        self._auto = auto

    def _do(self, statement: LiteralString) -> None:
        psycopg.Cursor(self).execute(statement)
        self._begun = False

    @contextmanager
    def _statement(self) -> Iterator[None]:
        alone, self._begun = self._auto and not self._begun, True
        try:
            yield
        finally:
            if alone:
                self._do(self._end())

    def commit(self) -> None:
        self._do(self._end())

    def rollback(self) -> None:
        self._do(_ROLLBACK)

    @contextmanager
    def transaction(self, *args: Any, **kwargs: Any) -> Iterator[psycopg.Transaction]:
        whole, self._begun = not self._begun, True
        try:
            with super().transaction(*args, **kwargs) as transaction:
                yield transaction
        finally:
            if whole:
                self._do(self._end())

    def set_autocommit(self, value: bool) -> None:
        self._set_auto(value)

    def close(self) -> None:
        """Roll back uncommitted changes; the next `connect` returns the same connection."""
        if not self.closed:
            self.rollback()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            self.commit()
        else:
            self.rollback()


class _AsyncConnection(_State, psycopg.AsyncConnection[Any]):
    """Like `_Connection`, for asyncio."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cursor_factory = _AsyncCursor

    async def _begin(self, auto: bool) -> None:
        await self._do(_NEW)
        self._auto = auto

    async def _do(self, statement: LiteralString) -> None:
        await psycopg.AsyncCursor(self).execute(statement)
        self._begun = False

    @asynccontextmanager
    async def _statement(self) -> AsyncIterator[None]:
        alone, self._begun = self._auto and not self._begun, True
        try:
            yield
        finally:
            if alone:
                await self._do(self._end())

    async def commit(self) -> None:
        await self._do(self._end())

    async def rollback(self) -> None:
        await self._do(_ROLLBACK)

    @asynccontextmanager
    async def transaction(
        self, *args: Any, **kwargs: Any
    ) -> AsyncIterator[psycopg.AsyncTransaction]:
        whole, self._begun = not self._begun, True
        try:
            async with super().transaction(*args, **kwargs) as transaction:
                yield transaction
        finally:
            if whole:
                await self._do(self._end())

    async def set_autocommit(self, value: bool) -> None:
        self._set_auto(value)

    async def close(self) -> None:
        """Like `_Connection.close`."""
        if not self.closed:
            await self.rollback()

    async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            await self.commit()
        else:
            await self.rollback()
