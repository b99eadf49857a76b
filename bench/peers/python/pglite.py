"""py-pglite: PGlite in node, behind a socket that serves one connection."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
from peer import KEPT, PLACE, Cannot, Peer, Server, make_tables

INSTALLED = KEPT / "py-pglite"
# As its own fixture does, but all of them at once, which is faster.
EMPTY = f"TRUNCATE {', '.join(f't{i}' for i in range(50))} RESTART IDENTITY CASCADE".encode()


class Pglite(Peer):
    """Its one database is emptied before each test, by its one connection."""

    def __init__(self) -> None:
        from py_pglite import PGliteConfig, PGliteManager  # type: ignore[import-untyped]

        self._config, self._manager = PGliteConfig, PGliteManager
        self._open = ExitStack()
        self._connection: psycopg.Connection[Any] | None = None

    def prepare(self) -> None:
        """Have it install what it needs, which it does in a directory that has nothing yet."""
        with self._running(INSTALLED):
            pass

    @contextmanager
    def server(self) -> Iterator[Server]:
        work = Path(tempfile.mkdtemp(dir=PLACE))
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
                # What its README connects with, at once: `wait_for_ready` would only take longer.
                yield Server(manager.get_dsn(), manager.process.pid, [str(work), str(socket)])
        finally:
            shutil.rmtree(socket)

    def template(self, content: str) -> None:
        if self._connection is None:
            uri = self._open.enter_context(self.server()).uri
            # Its own engine has one connection, which stays, and prepares nothing.
            connection = psycopg.connect(uri, prepare_threshold=None)
            self._connection = self._open.enter_context(connection)
            make_tables(connection)
            connection.commit()

    def database(self, content: str) -> AbstractContextManager[str]:
        raise Cannot("it has one database, of one connection")

    def sustained(self, count: int, clients: int, content: str) -> float:
        raise Cannot("it has one database, of one connection")

    @contextmanager
    def test(self) -> Iterator[psycopg.Connection[Any]]:
        assert self._connection is not None
        self._connection.execute(EMPTY)
        self._connection.commit()
        yield self._connection
        self._connection.commit()

    def end(self) -> None:
        self._open.close()
