"""What a peer can be asked, and what all of them do alike."""

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

BIN, PLACE, KEPT = (Path(os.environ[f"BENCH_{name}"]) for name in ("BIN", "PLACE", "KEPT"))
SERVER = os.environ.get("BENCH_SERVER", "")
QUIET_SECONDS = 0.2


class Cannot(Exception):  # noqa: N818
    """A peer has no way to do something."""


@dataclass(frozen=True)
class Server:
    """One that runs: its URL, its postmaster, and the directories that were made for it.

    Attributes:
        pid: None where it is not the peer's to hold.
    """

    uri: str
    pid: int | None
    places: list[str]


def pid_of(data: Path) -> int:
    return int((data / "postmaster.pid").read_text().split()[0])


def tables(uri: str) -> None:
    """The fifty tables."""
    with psycopg.connect(uri) as connection:
        make_tables(connection)


def make_tables(connection: psycopg.Connection[Any]) -> None:
    for i in range(50):
        connection.execute(f"CREATE TABLE t{i} (a int, b int, c int, d int)".encode())
        for column in "abcd":
            connection.execute(f"CREATE INDEX ON t{i} ({column})".encode())


class Peer:
    """One of the peers; a method that is left out is something that it cannot do.

    What a peer has to import is imported when it is made, so that it is in no time.
    """

    def prepare(self) -> None:
        """Do what may be done ahead."""

    def server(self) -> AbstractContextManager[Server]:
        raise Cannot("it works on a server that is there")

    def template(self, content: str) -> None:
        """See that there is a template, unless the peer has none."""

    def database(self, content: str) -> AbstractContextManager[str]:
        """A fresh database; its URL."""
        raise Cannot("each of its databases is a server of its own, and it has no templates")

    @contextmanager
    def connection(self, content: str) -> Iterator[psycopg.Connection[Any]]:
        """The usual connection to a fresh database."""
        with self.database(content) as uri, psycopg.connect(uri) as connection:
            yield connection

    def test(self) -> AbstractContextManager[psycopg.Connection[Any]]:
        """What a test of a suite gets."""
        return self.connection("fifty")

    def sustained(self, count: int, clients: int, content: str) -> float:
        self.use(2 * clients + 8, clients, content)  # so that as many are kept ready as will be
        with self.watched(content) as ended:
            begun = time.perf_counter()
            self.use(count, clients, content)
            return (ended() - begun) * 1000

    @contextmanager
    def watched(self, content: str) -> Iterator[Callable[[], float]]:
        """For a block; what it yields waits until all is dropped, and tells when that was."""
        uri = self.watch(content)
        if uri is None:
            yield time.perf_counter
            return
        with psycopg.connect(uri, autocommit=True) as connection:
            last_change(connection)
            yield lambda: last_change(connection)

    def watch(self, content: str) -> str | None:
        """Where to look for when all is dropped; None where giving back waits for it."""
        return None

    def use(self, count: int, clients: int, content: str) -> None:
        """Have so many databases, and give them back, by so many clients at once."""

        def one(_: int) -> None:
            with self.connection(content) as connection:
                connection.execute("SELECT 1").fetchone()

        with ThreadPoolExecutor(clients) as threads:
            list(threads.map(one, range(count)))

    def asyncpg(self, query: str) -> float:
        """Milliseconds from asking for a fresh database to its first row, by asyncpg."""

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
        """Take away what is there still."""


def last_change(connection: psycopg.Connection[Any]) -> float:
    """When the number of databases of a server has changed last; waits until it stays."""
    count, changed = None, time.perf_counter()
    while time.perf_counter() - changed < QUIET_SECONDS:
        row = connection.execute("SELECT count(*) FROM pg_database").fetchone()
        if row != count:
            count, changed = row, time.perf_counter()
        time.sleep(0.001)
    return changed
