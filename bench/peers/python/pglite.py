"""py-pglite: PGlite in Node.js, behind a socket that serves one connection."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
from peer import CACHE, DATA, Cannot, Peer, Server, make_tables

INSTALLED = CACHE / "py-pglite"
# As its own fixture does, but for all tables in one statement, which is faster.
EMPTY = f"TRUNCATE {', '.join(f't{i}' for i in range(50))} RESTART IDENTITY CASCADE".encode()


class Pglite(Peer):
    """Its only database is emptied before each test, through its only connection."""

    def __init__(self) -> None:
        from py_pglite import PGliteConfig, PGliteManager  # type: ignore[import-untyped]

        self._config, self._manager = PGliteConfig, PGliteManager
        self._open = ExitStack()
        self._connection: psycopg.Connection[Any] | None = None

    def prepare(self) -> None:
        """Let it install its dependencies, which it does in an empty directory."""
        with self._running(INSTALLED):
            pass

    @contextmanager
    def server(self) -> Iterator[Server]:
        work = Path(tempfile.mkdtemp(dir=DATA))
        if (INSTALLED / "node_modules").exists():
            (work / "node_modules").symlink_to(INSTALLED / "node_modules")
        try:
            with self._running(work) as server:
                yield server
        finally:
            shutil.rmtree(work)

    @contextmanager
    def _running(self, work: Path) -> Iterator[Server]:
        config = self._config(work_dir=work)
        socket = Path(config.socket_path).parent
        try:
            with self._manager(config) as manager:
                assert manager.process is not None
                # The first connection, as in its README: `wait_for_ready` would only take longer.
                yield Server(manager.get_dsn(), manager.process.pid, [str(work), str(socket)])
        finally:
            shutil.rmtree(socket)

    def template(self, content: str) -> None:
        if self._connection is None:
            uri = self._open.enter_context(self.server()).uri
            # Its own engine has one permanent connection, and prepares no statements.
            connection = psycopg.connect(uri, prepare_threshold=None)
            self._connection = self._open.enter_context(connection)
            make_tables(connection)
            connection.commit()

    def database(self, content: str) -> AbstractContextManager[str]:
        raise Cannot("it has one database with one connection")

    def sustained(self, count: int, clients: int, content: str) -> float:
        raise Cannot("it has one database with one connection")

    @contextmanager
    def test(self) -> Iterator[psycopg.Connection[Any]]:
        assert self._connection is not None
        self._connection.execute(EMPTY)
        self._connection.commit()
        yield self._connection
        self._connection.commit()

    def end(self) -> None:
        self._open.close()
