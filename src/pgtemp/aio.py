"""The same doors for asyncio: whole brackets in a thread, right also when cancelled.

Cancelling a task does not stop a thread. A plain `await to_thread(start)`, cancelled while a
server starts, would leave the server behind; here whoever is cancelled waits for the thread and
undoes what it did, and only then is cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psycopg

from pgtemp import pgtempdb
from pgtemp.options import ServerOptions, StrPath, takes_options
from pgtemp.uri import ConnectionInfo

T = TypeVar("T")


async def whole(do: Callable[[], T], undo: Callable[[], object] | None = None) -> T:
    """Run `do` in a thread to its end; when cancelled, also `undo`, and then be cancelled."""
    working = asyncio.ensure_future(asyncio.to_thread(do))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        if await _to_its_end(working) and undo is not None:
            await _to_its_end(asyncio.ensure_future(asyncio.to_thread(undo)))
        raise


async def _to_its_end(working: asyncio.Future[T]) -> bool:
    """Wait for it, however often we are cancelled meanwhile; True if it did what it should."""
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError:
            continue
    return not working.cancelled() and working.exception() is None


class PgTempDB:
    """A PostgreSQL server with one database, for asyncio. As `pgtemp.PgTempDB`, but awaited.

    async with pgtemp.aio.PgTempDB() as db:
        await asyncpg.connect(db.uri)
    """

    @takes_options(ServerOptions)
    def __init__(self, options: ServerOptions) -> None:
        self._handle = pgtempdb.PgTempDB.with_options(options)

    @classmethod
    def from_uri(cls, uri: str, **options: Any) -> Self:
        """As `pgtemp.PgTempDB.from_uri`."""
        self = cls.__new__(cls)
        self._handle = pgtempdb.PgTempDB.from_uri(uri, **options)
        return self

    @property
    def sync(self) -> pgtempdb.PgTempDB:
        """The handle for synchronous code, with all its attributes."""
        return self._handle

    @property
    def uri(self) -> str:
        """The URL for any driver, with the password."""
        return self._handle.uri

    @property
    def info(self) -> ConnectionInfo:
        """Host, port, user, password and database in one value."""
        return self._handle.info

    @property
    def host(self) -> str:
        """The host; the socket's directory where there is no TCP."""
        return self._handle.host

    @property
    def port(self) -> int:
        """The TCP port; without TCP, the number in the socket's name."""
        return self._handle.port

    @property
    def user(self) -> str:
        return self._handle.user

    @property
    def password(self) -> str | None:
        """The password; None where there is no TCP."""
        return self._handle.password

    @property
    def dbname(self) -> str:
        return self._handle.dbname

    @property
    def socket_dir(self) -> Path:
        """The directory of the unix socket."""
        return self._handle.socket_dir

    @property
    def data_dir(self) -> Path:
        """The data directory; after `stop()`, the one that was kept."""
        return self._handle.data_dir

    @property
    def log_path(self) -> Path:
        """The server's log."""
        return self._handle.log_path

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        return self._handle.pid

    async def start(self) -> Self:
        """As `pgtemp.PgTempDB.start`; cancelled, it leaves nothing behind."""
        await whole(self._handle.start, undo=self._handle.stop)
        return self

    async def stop(self) -> None:
        """As `pgtemp.PgTempDB.stop`; cancelled, it is done all the same."""
        await whole(self._handle.stop)

    async def dump(self, path: StrPath) -> None:
        """As `pgtemp.PgTempDB.dump`."""
        await whole(lambda: self._handle.dump(path))

    async def load(self, path: StrPath) -> None:
        """As `pgtemp.PgTempDB.load`."""
        await whole(lambda: self._handle.load(path))

    async def connect(self, **kwargs: Any) -> psycopg.AsyncConnection[Any]:
        """An asynchronous psycopg connection; keyword arguments are psycopg's."""
        return await psycopg.AsyncConnection.connect(self.uri, **kwargs)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    def __repr__(self) -> str:
        return f"aio.{self._handle!r}"
