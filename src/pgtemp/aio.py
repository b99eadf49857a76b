"""PgTempDB, Cluster, Template and Database for asyncio; every operation runs in a thread.

Cancelling a task does not stop a thread. If a plain `await to_thread(start)` were cancelled while a
server starts, the server would keep running. In this module, a cancelled task waits for the thread
and undoes its work before it raises CancelledError.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import psycopg

from pgtemp import cluster, database, libpq, pgtempdb, template
from pgtemp.database import Snapshot
from pgtemp.options.server import ServerOptions, StrPath, takes_options
from pgtemp.templates.recipe import Build, Recipe
from pgtemp.uri import ConnectionInfo

T = TypeVar("T")


async def whole(do: Callable[[], T], undo: Callable[[], object] | None = None) -> T:
    """Run `do` in a thread until it completes.

    If the task is cancelled meanwhile and `do` succeeds, run `undo` before raising CancelledError.
    """
    working = asyncio.ensure_future(asyncio.to_thread(do))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        if await to_its_end(working) and undo is not None:
            await to_its_end(asyncio.ensure_future(asyncio.to_thread(undo)))
        raise


async def to_its_end(working: asyncio.Future[T]) -> bool:
    """Wait for a future, even if the task is cancelled meanwhile; return whether it succeeded."""
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError:
            continue
    return not working.cancelled() and working.exception() is None


class PgTempDB:
    """A PostgreSQL server with one database, for asyncio: `pgtemp.PgTempDB` with coroutines.

    Keyword arguments are `pgtemp.ServerOptions`.

        async with pgtemp.aio.PgTempDB() as db:
            await asyncpg.connect(db.uri)
    """

    @takes_options(ServerOptions)
    def __init__(self, options: ServerOptions) -> None:
        self._handle = pgtempdb.PgTempDB.with_options(options)

    @classmethod
    def from_uri(cls, uri: str, **options: Any) -> Self:
        """See `pgtemp.PgTempDB.from_uri`."""
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
        """The host; without TCP, the socket's directory."""
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
        """The password; None without TCP."""
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
        """The data directory; after `stop()`, the persisted one."""
        return self._handle.data_dir

    @property
    def log_path(self) -> Path:
        """The file of the server log."""
        return self._handle.log_path

    @property
    def pid(self) -> int:
        """The postmaster's process id."""
        return self._handle.pid

    async def start(self) -> Self:
        """See `pgtemp.PgTempDB.start`; if the task is cancelled, nothing is left behind."""
        await whole(self._handle.start, undo=self._handle.stop)
        return self

    async def stop(self) -> None:
        """See `pgtemp.PgTempDB.stop`; the server is stopped even if the task is cancelled."""
        await whole(self._handle.stop)

    async def dump(self, path: StrPath) -> None:
        """See `pgtemp.PgTempDB.dump`."""
        await whole(lambda: self._handle.dump(path))

    async def load(self, path: StrPath) -> None:
        """See `pgtemp.PgTempDB.load`."""
        await whole(lambda: self._handle.load(path))

    async def connect(self, **kwargs: Any) -> psycopg.AsyncConnection[Any]:
        """An asynchronous psycopg connection; keyword arguments are psycopg's."""
        return await libpq.aconnect(psycopg.AsyncConnection, self.info, kwargs)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def __repr__(self) -> str:
        return f"aio.{self._handle!r}"


class Cluster:
    """Many databases, for asyncio: `pgtemp.Cluster` with coroutines.

    Keyword arguments are `pgtemp.ServerOptions`.

        async with pgtemp.aio.Cluster() as cluster:
            app = await cluster.template("app", build=migrate)  # may be a coroutine function
            async with await app.database() as db: ...
    """

    @takes_options(ServerOptions)
    def __init__(self, options: ServerOptions) -> None:
        self._cluster = cluster.Cluster.with_options(options)

    @property
    def sync(self) -> cluster.Cluster:
        """The cluster for synchronous code."""
        return self._cluster

    async def start(self) -> Self:
        """See `pgtemp.Cluster.start`; if the task is cancelled, nothing is left behind."""
        await whole(self._cluster.start, undo=self._cluster.stop)
        return self

    async def stop(self) -> None:
        """See `pgtemp.Cluster.stop`; all servers are stopped even if the task is cancelled."""
        await whole(self._cluster.stop)

    async def template(
        self,
        name: str,
        build: Build | Recipe | Callable[[str], Awaitable[object]],
        *,
        key: str | None = None,
        watch: Sequence[StrPath] = (),
    ) -> Template:
        """See `pgtemp.Cluster.template`; a coroutine function runs on this event loop."""
        on_loop = _on_loop(build)
        return Template(
            await whole(lambda: self._cluster.template(name, on_loop, key=key, watch=watch))
        )

    async def database(self) -> Database:
        """See `pgtemp.Cluster.database`; if the task is cancelled, the database is given back."""
        return await _claim(self._cluster.database)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


class Template:
    """A sealed database that others are cloned from: `pgtemp.Template` with coroutines."""

    def __init__(self, wrapped: template.Template) -> None:
        self._template = wrapped
        self.name = wrapped.name

    async def database(self) -> Database:
        """See `pgtemp.Template.database`; if the task is cancelled, the database is given back."""
        return await _claim(self._template.database)

    async def template(
        self,
        name: str,
        build: Build | Recipe | Callable[[str], Awaitable[object]],
        *,
        key: str | None = None,
        watch: Sequence[StrPath] = (),
    ) -> Template:
        """Return a template that starts from this template."""
        on_loop = _on_loop(build)
        return Template(
            await whole(lambda: self._template.template(name, on_loop, key=key, watch=watch))
        )


class Database:
    """One clone, with a URL: `pgtemp.Database` with coroutines."""

    def __init__(self, database: database.Database) -> None:
        self._database = database
        self.info = database.info

    @property
    def uri(self) -> str:
        """The URL for any driver, with the password."""
        return self._database.uri

    @property
    def dbname(self) -> str:
        return self._database.dbname

    async def connect(self, **kwargs: Any) -> psycopg.AsyncConnection[Any]:
        """An asynchronous psycopg connection; keyword arguments are psycopg's."""
        return await libpq.aconnect(psycopg.AsyncConnection, self.info, kwargs)

    async def dump(self, path: StrPath) -> None:
        """See `pgtemp.Database.dump`."""
        await whole(lambda: self._database.dump(path))

    async def load(self, path: StrPath) -> None:
        """See `pgtemp.Database.load`."""
        await whole(lambda: self._database.load(path))

    async def snapshot(self, name: str) -> Snapshot:
        """See `pgtemp.Database.snapshot`."""
        return await whole(lambda: self._database.snapshot(name))

    async def restore(self, snapshot: Snapshot) -> None:
        """See `pgtemp.Database.restore`."""
        await whole(lambda: self._database.restore(snapshot))

    async def fork(self) -> Database:
        """See `pgtemp.Database.fork`."""
        return await _claim(self._database.fork)

    async def close(self) -> None:
        """See `pgtemp.Database.close`; it does not wait."""
        self._database.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"aio.{self._database!r}"


async def _claim(make: Callable[[], database.Database]) -> Database:
    """Claim a database in a thread; if the task is cancelled meanwhile, close it."""
    made: list[database.Database] = []
    await whole(lambda: made.append(make()), undo=lambda: made[0].close())
    return Database(made[0])


@dataclass(frozen=True, slots=True)
class _OnLoop:
    """A build whose coroutine runs on the event loop of the caller.

    Two objects are equal if they have the same function, so that a template can be requested
    repeatedly with the same build.
    """

    build: Callable[[str], object]
    loop: asyncio.AbstractEventLoop = field(compare=False)

    @property
    def __wrapped__(self) -> Callable[[str], object]:
        return self.build  # recipe.py finds the original function through this attribute

    def __call__(self, uri: str) -> object:
        result = self.build(uri)
        if inspect.isawaitable(result):
            return asyncio.run_coroutine_threadsafe(_awaited(result), self.loop).result()
        return result


async def _awaited(result: Awaitable[object]) -> object:
    return await result


def _on_loop(build: Build | Recipe | Callable[[str], Awaitable[object]]) -> Build | Recipe:
    return _OnLoop(build, asyncio.get_running_loop()) if callable(build) else build
