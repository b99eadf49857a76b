"""Peers that create databases on a running server."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import count as numbers
from typing import Any

import psycopg
from peer import BIN, SERVER, Cannot, Peer, tables
from servers import PytestPostgresql


def url_of(name: str) -> str:
    return f"{SERVER.rpartition('/')[0]}/{name}"


def make_once(name: str, content: str) -> None:
    """Create a database with this content on the server, unless it exists."""
    with psycopg.connect(SERVER, autocommit=True) as connection:
        try:
            connection.execute(f"CREATE DATABASE {name}".encode())
        except psycopg.errors.DuplicateDatabase:
            return
        if content == "fifty":
            tables(url_of(name))
        connection.execute("CHECKPOINT")


class Old(Peer):
    """An existing database that is not a template, so it may have connections."""

    name = "python_old"

    def template(self, content: str) -> None:
        make_once(self.name, "fifty")

    def database(self, content: str) -> AbstractContextManager[str]:
        raise Cannot("it uses an existing database")

    def sustained(self, count: int, clients: int, content: str) -> float:
        raise Cannot("it uses an existing database")

    def test(self) -> AbstractContextManager[psycopg.Connection[Any]]:
        raise Cannot("it uses an existing database")


class Direct(Old):
    """A connection to the existing database, for comparison."""

    @contextmanager
    def database(self, content: str) -> Iterator[str]:
        yield url_of(self.name)


class RolledBack(Old):
    """One connection to the existing database, rolled back after each test."""

    def __init__(self) -> None:
        self._connection: psycopg.Connection[Any] | None = None

    @contextmanager
    def test(self) -> Iterator[psycopg.Connection[Any]]:
        if self._connection is None:
            self._connection = psycopg.connect(url_of(self.name))
        yield self._connection
        self._connection.rollback()

    def end(self) -> None:
        if self._connection is not None:
            self._connection.close()


class Cloned(Peer):
    """Databases that CREATE DATABASE clones from a template, to which no client is connected."""

    def __init__(self) -> None:
        self._numbers = numbers()

    def template(self, content: str) -> None:
        make_once(f"python_{content}", content)

    def name(self) -> str:
        return f"python_{os.getpid()}_{next(self._numbers)}"


class Janitor(Cloned, PytestPostgresql):
    """pytest-postgresql on a running server, in the way of its client fixture."""

    def __init__(self) -> None:
        Cloned.__init__(self)
        PytestPostgresql.__init__(self)
        from pytest_postgresql.janitor import DatabaseJanitor

        self._janitor = DatabaseJanitor

    @contextmanager
    def database(self, content: str) -> Iterator[str]:
        name = self.name()
        host, _, port = SERVER.rpartition("/")[0].rpartition("@")[2].partition(":")
        with self._janitor(
            user="postgres", host=host, port=port, dbname=name, template_dbname=f"python_{content}"
        ):
            yield url_of(name)


class Psql(Cloned):
    """psql that creates and drops databases in the fastest way."""

    def __init__(self) -> None:
        super().__init__()
        self._running: subprocess.Popen[str] | None = None

    def template(self, content: str) -> None:
        super().template(content)
        if self._running is None:
            self._running = self._start()

    def _start(self) -> subprocess.Popen[str]:
        """A psql process that is connected."""
        running = subprocess.Popen(
            [BIN / "psql", "-qAtX", "-v", "ON_ERROR_STOP=1", SERVER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self._run_statement(running, "")
        return running

    def _run_statement(self, psql: subprocess.Popen[str], statement: str) -> None:
        """Execute a statement."""
        assert psql.stdin is not None and psql.stdout is not None
        psql.stdin.write(f"{statement}\n\\echo done\n")
        if psql.stdout.readline() != "done\n":
            raise RuntimeError("psql failed")

    @contextmanager
    def database(self, content: str) -> Iterator[str]:
        assert self._running is not None
        name = self.name()
        self._run_statement(self._running, create(name, content))
        try:
            yield url_of(name)
        finally:
            # DROP DATABASE sleeps for 100 ms if it finds a connection.
            self._run_statement(self._running, f"{until_unused(name)} {drop(name)}")

    def sustained(self, count: int, clients: int, content: str) -> float:
        """As many psql processes as clients; no client connects to the databases."""
        scripts = [""] * clients
        for i in range(count):
            name = self.name()
            scripts[i % clients] += f"{create(name, content)}\n{drop(name)}\n"
        running = [self._start() for _ in range(clients)]
        with ThreadPoolExecutor(clients) as threads:
            begun = time.perf_counter()
            list(threads.map(lambda psql, script: psql.communicate(script), running, scripts))
            taken = (time.perf_counter() - begun) * 1000
        if any(psql.returncode for psql in running):
            raise RuntimeError("psql failed")
        return taken

    def end(self) -> None:
        if self._running is not None:
            self._running.communicate()


def create(name: str, content: str) -> str:
    return f"CREATE DATABASE {name} TEMPLATE python_{content} STRATEGY file_copy;"


def drop(name: str) -> str:
    return f"DROP DATABASE {name};"


def until_unused(name: str) -> str:
    """A statement that waits until no client is connected to a database."""
    return (
        f"DO $$ BEGIN WHILE EXISTS (SELECT FROM pg_stat_activity WHERE datname = '{name}') LOOP "
        "PERFORM pg_sleep(0.0005), pg_stat_clear_snapshot(); END LOOP; END $$;"
    )


DATABASES: dict[str, Callable[[], Peer]] = {
    "direct": Direct,
    "rollback": RolledBack,
    "pytest-postgresql": Janitor,
    "bare-psql": Psql,
}
