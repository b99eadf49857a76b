"""The commands of a peer, and code that all peers share."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import psycopg

BIN, DATA, CACHE = (Path(os.environ[f"BENCH_{name}"]) for name in ("BIN", "DATA", "CACHE"))
SERVER = os.environ.get("BENCH_SERVER", "")
QUIET_SECONDS = 0.2


class Cannot(Exception):  # noqa: N818
    """A peer does not support something."""


@dataclass(frozen=True)
class Server:
    """A running server: its URL, its postmaster, and the directories created for it.

    Attributes:
        pid: None if the server does not belong to the peer.
    """

    uri: str
    pid: int | None
    directories: list[str]


def pid_of(data: Path) -> int:
    return int((data / "postmaster.pid").read_text().split()[0])


def tables(uri: str) -> None:
    """Create the fifty tables."""
    with psycopg.connect(uri) as connection:
        make_tables(connection)


def make_tables(connection: psycopg.Connection[Any]) -> None:
    for i in range(50):
        connection.execute(f"CREATE TABLE t{i} (a int, b int, c int, d int)".encode())
        for column in "abcd":
            connection.execute(f"CREATE INDEX ON t{i} ({column})".encode())


class Peer:
    """One of the peers; a method that is not overridden is not supported.

    A peer imports its library when it is constructed, so that no measured time includes that.
    """

    def prepare(self) -> None:
        """Do everything that may be done in advance."""

    def server(self) -> AbstractContextManager[Server]:
        raise Cannot("it uses a running server")

    def template(self, content: str) -> None:
        """Ensure that there is a template, if the peer has templates."""

    def database(self, content: str) -> AbstractContextManager[str]:
        """A fresh database; yields its URL."""
        raise Cannot("it has one server per database, and no templates")

    @contextmanager
    def connection(self, content: str) -> Iterator[psycopg.Connection[Any]]:
        """The usual connection to a fresh database."""
        with self.database(content) as uri, psycopg.connect(uri) as connection:
            yield connection

    def test(self) -> AbstractContextManager[psycopg.Connection[Any]]:
        """The connection of a test of a suite."""
        return self.connection("fifty")

    def sustained(self, count: int, clients: int, content: str) -> float:
        self.use(2 * clients + 8, clients, content)  # so that the pool reaches its full size
        with self.watched(content) as ended:
            begun = time.perf_counter()
            self.use(count, clients, content)
            return (ended() - begun) * 1000

    @contextmanager
    def watched(self, content: str) -> Iterator[Callable[[], float]]:
        """For a block. The yielded function waits until all is dropped, and returns that time."""
        uri = self.watch(content)
        if uri is None:
            yield time.perf_counter
            return
        with psycopg.connect(uri, autocommit=True) as connection:
            last_change(connection)
            yield lambda: last_change(connection)

    def watch(self, content: str) -> str | None:
        """The URL of the server whose databases are watched; None if closing waits for the drop."""
        return None

    def use(self, count: int, clients: int, content: str) -> None:
        """Open a number of databases with a number of concurrent clients, and close them."""

        def one(_: int) -> None:
            with self.connection(content) as connection:
                connection.execute("SELECT 1").fetchone()

        with ThreadPoolExecutor(clients) as threads:
            list(threads.map(one, range(count)))

    def asyncpg(self, query: str) -> float:
        """Milliseconds from the request for a fresh database to its first row, with asyncpg."""

        async def ask() -> float:
            begun = time.perf_counter()
            with self.database("fifty") as uri:
                connection = await asyncpg.connect(uri)
                await connection.fetchval(query)
                taken = (time.perf_counter() - begun) * 1000
                await connection.close()
            return taken

        return asyncio.run(ask())

    def end(self) -> None:
        """Remove everything that the peer has created."""


def last_change(connection: psycopg.Connection[Any]) -> float:
    """The time of the last change of the number of databases; waits until it is stable."""
    count, changed = None, time.perf_counter()
    while time.perf_counter() - changed < QUIET_SECONDS:
        row = connection.execute("SELECT count(*) FROM pg_database").fetchone()
        if row != count:
            count, changed = row, time.perf_counter()
        time.sleep(0.001)
    return changed
