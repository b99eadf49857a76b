"""pgtemp: its library, and its daemon."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
from peer import BIN, DATA, SERVER, Peer, Server, make_tables, pid_of, tables

from pgtemp import Cluster, PgTempDB, Template


class Clusters(Peer):
    """The library with its defaults, except for the directory: the default is /dev/shm."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._cluster: Cluster | None = None
        self._templates: dict[str, Template] = {}

    @contextmanager
    def server(self) -> Iterator[Server]:
        with PgTempDB(bin_dir=BIN, data_dir_prefix=DATA) as db:
            yield Server(db.uri, pid_of(db.data_dir), [str(db.data_dir.parent)])

    def template(self, content: str) -> None:
        if self._cluster is None:
            cluster = Cluster(bin_dir=BIN, data_dir_prefix=DATA)
            self._cluster = self._open.enter_context(cluster)
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
        assert self._cluster is not None
        return self._cluster.info.uri

    def end(self) -> None:
        self._open.close()


class Daemon(Peer):
    """The daemon, with the usual connections of Python."""

    def __init__(self) -> None:
        self._made = False

    @contextmanager
    def server(self) -> Iterator[Server]:
        yield Server(SERVER, None, [])

    def template(self, content: str) -> None:
        if content == "fifty" and not self._made:  # opening a template creates a new version of it
            with psycopg.connect(f"{SERVER}~template") as connection:
                found = connection.execute("SELECT to_regclass('t0')").fetchone()
                if found == (None,):
                    make_tables(connection)
            self._made = True

    @contextmanager
    def database(self, content: str) -> Iterator[str]:
        yield SERVER if content == "fifty" else f"{SERVER.rpartition('/')[0]}/empty"

    def watch(self, content: str) -> str | None:
        """The URL of a lease in the same server, unless each lease has its own server."""
        identifier = "SELECT system_identifier FROM pg_control_system()"
        with (
            self.database(content) as uri,
            psycopg.connect(uri) as one,
            psycopg.connect(uri) as two,
        ):
            same = one.execute(identifier).fetchone() == two.execute(identifier).fetchone()
            return uri if same else None
