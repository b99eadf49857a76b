"""Peers that have databases, of a server that is there or of their own."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
from peer import (
    BIN,
    KEPT,
    PLACE,
    SERVER,
    Cannot,
    Peer,
    Server,
    tables,
)
from servers import Library, PytestPostgresql

from pgtemp import Cluster, Template


class Clusters(Library):
    """pgtemp's library."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._templates: dict[str, Template] = {}

    def template(self, content: str) -> None:
        if not self._templates:
            self._cluster = self._open.enter_context(Cluster(bin_dir=BIN))
        if content not in self._templates:
            build = tables if content == "fifty" else lambda uri: None
            self._templates[content] = self._cluster.template(content, build=build)

    @contextmanager
    def database(self, content: str) -> Iterator[str]:
        with self._templates[content].database() as db:
            yield db.uri

    @contextmanager
    def connection(self, content: str) -> Iterator[psycopg.Connection[Any]]:
        with self._templates[content].database() as db, db.connect() as connection:
            yield connection

    def watch(self, content: str) -> str | None:
        return self._cluster.info.uri

    def end(self) -> None:
        self._open.close()


class Daemon(Peer):
    """pgtemp's daemon, entered with what Python enters with."""

    def __init__(self) -> None:
        self._there: set[str] = set()

    def _uri(self, content: str) -> str:
        return SERVER if content == "fifty" else SERVER.replace("/app", "/empty")

    def template(self, content: str) -> None:
        if content == "fifty" and content not in self._there:
            with psycopg.connect(f"{SERVER}~template") as connection:
                found = connection.execute("SELECT 1 FROM pg_tables WHERE tablename = 't0'")
                if found.fetchone() is None:
                    connection.close()
                    tables(f"{SERVER}~template")
        self._there.add(content)

    @contextmanager
    def server(self) -> Iterator[Server]:
        yield Server(SERVER, 0, [])

    @contextmanager
    def database(self, content: str) -> Iterator[str]:
        yield self._uri(content)

    def watch(self, content: str) -> str | None:
        """A connection of one's own is in the same server, unless each has one."""
        uri = self._uri(content)
        identifier = "SELECT system_identifier FROM pg_control_system()"
        with psycopg.connect(uri) as one, psycopg.connect(uri) as other:
            same = one.execute(identifier).fetchone() == other.execute(identifier).fetchone()
        return uri if same else None


class Direct(Peer):
    """An old database."""

    def template(self, content: str) -> None:
        make_once(content)

    @contextmanager
    def database(self, content: str) -> Iterator[str]:
        yield f"{SERVER.rpartition('/')[0]}/old_{content}"

    def sustained(self, count: int, clients: int, content: str) -> float:
        raise Cannot("its database is an old one")


class RolledBack(Direct):
    """One connection to an old database, rolled back after each test."""

    @contextmanager
    def connection(self, content: str) -> Iterator[psycopg.Connection[Any]]:
        if not hasattr(self, "_connection"):
            self._connection = psycopg.connect(f"{SERVER.rpartition('/')[0]}/old_{content}")
        yield self._connection
        self._connection.rollback()


class Janitor(PytestPostgresql):
    """pytest-postgresql's way on a server that is there, as its client fixture does it."""

    def __init__(self) -> None:
        self._number = 0

    def template(self, content: str) -> None:
        make_once(content)

    @contextmanager
    def database(self, content: str) -> Iterator[str]:
        from pytest_postgresql.janitor import DatabaseJanitor

        self._number += 1
        name = f"janitor_{os.getpid()}_{self._number}"
        host, _, port = SERVER.rpartition("/")[0].rpartition("@")[2].partition(":")
        with psycopg.connect(SERVER) as connection:
            version = str(connection.info.server_version // 10000)
        with DatabaseJanitor(
            user="postgres", host=host, port=port, version=version, dbname=name,
            template_dbname=f"old_{content}",
        ):  # fmt: skip
            yield f"postgresql://postgres@{host}:{port}/{name}"


class Psql(Peer):
    """One psql that is told to make and drop databases, in the quickest way there is."""

    def __init__(self) -> None:
        self._number = 0

    def template(self, content: str) -> None:
        make_once(content)

    def _psql(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [BIN / "psql", "-qAtX", SERVER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    @contextmanager
    def database(self, content: str) -> Iterator[str]:
        self._number += 1
        name = f"psql_{os.getpid()}_{self._number}"
        if not hasattr(self, "_running"):
            self._running = self._psql()
        assert self._running.stdin is not None and self._running.stdout is not None
        create = f"CREATE DATABASE {name} TEMPLATE old_{content} STRATEGY file_copy;\n"
        for statement, after in ((create, None), (f"DROP DATABASE {name};\n", "dropped")):
            self._running.stdin.write(f"{statement}\\echo done\n")
            self._running.stdin.flush()
            self._running.stdout.readline()
            if after is None:
                yield f"{SERVER.rpartition('/')[0]}/{name}"

    def sustained(self, count: int, clients: int, content: str) -> float:
        """As many programs as clients; nobody connects to what they make."""
        scripts = []
        for client in range(clients):
            names = [f"psql_{os.getpid()}_{client}_{i}" for i in range(count // clients)]
            scripts.append("".join(
                f"CREATE DATABASE {name} TEMPLATE old_{content} STRATEGY file_copy;\n"
                f"DROP DATABASE {name};\n" for name in names
            ))  # fmt: skip
        begun = time.perf_counter()
        running = [self._psql() for _ in range(clients)]
        for one, script in zip(running, scripts, strict=True):
            assert one.stdin is not None
            one.stdin.write(script)
            one.stdin.close()
        if any(one.wait() for one in running):
            raise RuntimeError("psql has failed")
        return (time.perf_counter() - begun) * 1000

    def end(self) -> None:
        if hasattr(self, "_running"):
            self._running.communicate()


class Pglite(Peer):
    """py-pglite: PGlite in node, behind a socket; its tables are emptied before each test."""

    def prepare(self) -> None:
        with self.server():
            pass

    @contextmanager
    def server(self) -> Iterator[Server]:
        from py_pglite import PGliteConfig, PGliteManager

        work = Path(tempfile.mkdtemp(dir=PLACE))
        installed = KEPT / "node_modules"
        if installed.exists():
            (work / "node_modules").symlink_to(installed)
        with PGliteManager(PGliteConfig(work_dir=work)) as manager:
            if not installed.exists():
                (work / "node_modules").rename(installed)
            manager.wait_for_ready()
            process = manager.process
            assert process is not None
            yield Server(manager.get_psycopg_uri(), process.pid, [])

    def template(self, content: str) -> None:
        if not hasattr(self, "_open"):
            self._open = ExitStack()
            self._uri = self._open.enter_context(self.server()).uri
            tables(self._uri)

    def database(self, content: str) -> Any:
        raise Cannot("it has one database")

    def sustained(self, count: int, clients: int, content: str) -> float:
        raise Cannot("it has one database")

    @contextmanager
    def connection(self, content: str) -> Iterator[psycopg.Connection[Any]]:
        with psycopg.connect(self._uri) as connection:
            connection.execute("TRUNCATE " + ", ".join(f"t{i}" for i in range(50)))
            yield connection

    def end(self) -> None:
        if hasattr(self, "_open"):
            self._open.close()


def make_once(content: str) -> None:
    """An old database of that content on the server."""
    name = f"old_{content}"
    with psycopg.connect(SERVER, autocommit=True) as connection:
        try:
            connection.execute(f"CREATE DATABASE {name}".encode())
        except psycopg.errors.DuplicateDatabase:
            return
        if content == "fifty":
            tables(f"{SERVER.rpartition('/')[0]}/{name}")
        connection.execute("CHECKPOINT")


DATABASES: dict[str, Callable[[], Peer]] = {
    "pgtemp": Clusters,
    "pgtemp-daemon": Daemon,
    "direct": Direct,
    "rollback": RolledBack,
    "pytest-postgresql": Janitor,
    "bare-psql": Psql,
    "py-pglite": Pglite,
}
