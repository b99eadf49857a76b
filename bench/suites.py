"""Suites of tests with a fresh database each: milliseconds a test, pytest's own share included.

python -m bench.suites [--tests 100] [--rounds 10] [--kind trivial|computing|waiting] [--way …]
                           [--keep DIR]

Each test gets a database of fifty tables with two hundred indexes, inserts a row and reads it; the
computing and waiting kinds compute or wait for 25 ms more. Each suite is its own pytest process
that loads only the plugin under test. The first test, which sets everything up, is not counted. The
base is a loop of two connections that create and drop such databases.

pytest-postgresql uses a server started with its own options; the hand-written fixtures use one with
pgtemp's settings. py-pglite has one database, in which it empties all tables before each test.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from textwrap import dedent

import psycopg

from bench.databases import tables
from bench.report import Table, machine
from pgtemp import Cluster, PgTempDB
from pgtemp.host import identity, paths, ports, processes
from pgtemp.programs import search

BASE = "bare loop, two connections"
COUNT = 40  # databases in a sample of the bare loop
WORK_SECONDS = 0.025
ROOT = Path(__file__).parents[1]

# Writes the time at which each test ended.
_CLOCK = """
import json, os, time

ends = []

def pytest_runtest_logfinish(nodeid, location):
    ends.append(time.perf_counter())

def pytest_sessionfinish(session):
    with open("ends.json", "w") as file:
        json.dump(ends, file)
"""
_TESTS = """
import time
import pytest

def work():
    kind, end = {kind!r}, time.perf_counter() + {seconds}
    if kind == "waiting":
        time.sleep({seconds})
    while kind == "computing" and time.perf_counter() < end:
        pass

@pytest.mark.parametrize("n", range({tests}))
def test_one(db, n):
    db.execute("INSERT INTO t0 VALUES (%s, 1, 1, 1)", [n])
    work()
    assert db.execute("SELECT count(*) FROM t0").fetchone() == (1,)
"""
_PGTEMP = """
import psycopg
import pytest
from bench.databases import tables

@pytest.fixture(scope="session")
def pgtemp_template():
    return tables
"""
_ON_A_SERVER = """
import os
import secrets
import psycopg
import pytest

SERVER = os.environ["BENCH_SERVER"]
"""
CONFTESTS = {
    "pgtemp, pgtemp.connect()": _PGTEMP + """
@pytest.fixture
def db(pgtemp):
    return pgtemp.connect()
""",
    "pgtemp, pgtemp_uri": _PGTEMP + """
@pytest.fixture
def db(pgtemp_uri):
    with psycopg.connect(pgtemp_uri) as connection:
        yield connection
""",
    "rollback, one connection": _ON_A_SERVER + """
@pytest.fixture(scope="session")
def connection():
    with psycopg.connect(SERVER + " dbname=fifty") as connection:
        yield connection

@pytest.fixture
def db(connection):
    yield connection
    connection.rollback()
""",
    "CREATE and DROP by hand": _ON_A_SERVER + """
@pytest.fixture(scope="session")
def admin():
    with psycopg.connect(SERVER + " dbname=postgres", autocommit=True) as connection:
        yield connection

@pytest.fixture
def db(admin):
    name = "test_" + secrets.token_hex(4)
    admin.execute(f"CREATE DATABASE {name} TEMPLATE fifty")
    with psycopg.connect(f"{SERVER} dbname={name}") as connection:
        yield connection
    admin.execute(f"DROP DATABASE {name}")
""",
    "pytest-postgresql, tmpfs": _ON_A_SERVER + """
from pytest_postgresql import factories
from bench.databases import tables

def load(host, port, user, dbname, password, **rest):
    tables(f"postgresql://{user}@{host}:{port}/{dbname}")

parts = dict(part.split("=") for part in SERVER.split())
running = factories.postgresql_noproc(
    host=parts["host"], port=int(parts["port"]), user="postgres", load=[load])
db = factories.postgresql("running")
""",
    "py-pglite (empties its tables)": """
import pytest
from sqlalchemy import text

@pytest.fixture(scope="session")
def fifty(pglite_engine):
    with pglite_engine.begin() as connection:
        for i in range(50):
            connection.execute(text(f"CREATE TABLE t{i} (a int, b int, c int, d int)"))
            for column in "abcd":
                connection.execute(text(f"CREATE INDEX ON t{i} ({column})"))

class Session:
    def __init__(self, session):
        self.session = session
    def execute(self, statement, values=()):
        statement = statement % tuple(values) if values else statement
        result = self.session.execute(text(statement))
        self.fetchone = lambda: tuple(result.fetchone())
        return self

@pytest.fixture
def db(fifty, pglite_session):
    return Session(pglite_session)
""",
}  # fmt: skip
CONFTESTS["pytest-postgresql, its own place"] = CONFTESTS["pytest-postgresql, tmpfs"]
_PLUGINS = {
    "pgtemp": ["pgtemp.pytest_plugin"],
    "pytest": ["pytest_postgresql.plugin"],
    "py-pglite": ["py_pglite.sqlalchemy.fixtures"],
}


def suite(way: str, kind: str, tests: int, server: str) -> float:
    """Milliseconds per test."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        directory = Path(folder)
        (directory / "conftest.py").write_text(dedent(CONFTESTS[way]) + _CLOCK)
        body = _TESTS.format(kind=kind, seconds=WORK_SECONDS, tests=tests + 1)
        (directory / "test_suite.py").write_text(body)
        plugins = [part for name in _PLUGINS if way.startswith(name) for part in _PLUGINS[name]]
        argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        for plugin in plugins:
            argv += ["-p", plugin]
        environment = {
            **os.environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": str(ROOT),
            "BENCH_SERVER": server,
        }
        result = subprocess.run(
            argv, cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            raise RuntimeError(f"{way}: {result.stdout[-2000:]}{result.stderr[-500:]}")
        ends = json.loads((directory / "ends.json").read_text())
    return float((ends[-1] - ends[0]) * 1000 / tests)


def two_connections(cluster: Cluster, dbname: str) -> float:
    """Milliseconds per database: two connections create and drop databases."""

    def loop(which: int) -> None:
        with psycopg.connect(cluster.info.uri, autocommit=True) as connection:
            for _ in range(COUNT):
                connection.execute(
                    f'CREATE DATABASE bare{which} TEMPLATE "{dbname}" STRATEGY file_copy'
                )
                connection.execute(f"DROP DATABASE bare{which}")

    start = time.perf_counter()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(loop, range(2)))
    return (time.perf_counter() - start) * 1000 / (2 * COUNT)


@contextmanager
def pytest_postgresql_server(version: str, folder: Path) -> Iterator[str]:
    """A server with the options that pytest-postgresql gives its own."""
    owner = identity.choose(None)
    programs = search.find(None, version).within_reach(owner)
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=folder))
    os.chown(directory, owner.uid, owner.gid)
    data, port = directory / "data", ports.free_port("127.0.0.1")
    control = programs.program("pg_ctl")
    processes.run(
        [control, "initdb", "--pgdata", data, "-o", "--username=postgres --auth=trust"],
        identity=owner,
    )
    options = (
        f"-F -p {port} -c log_destination=stderr -c logging_collector=off "
        f"-c unix_socket_directories={directory}"
    )
    log = directory / "log"
    try:
        started = processes.run(
            [control, "start", "-D", data, "-l", log, "-w", "-o", options], identity=owner
        )
        if started.returncode != 0:
            raise RuntimeError(started.stdout + started.stderr)
        yield f"host=127.0.0.1 port={port} user=postgres"
    finally:
        processes.run([control, "stop", "-D", data, "-m", "immediate"], identity=owner)
        subprocess.run(["rm", "-rf", directory], check=True)


def measure(version: str, kind: str, ways: Sequence[str], tests: int, rounds: int) -> Table:
    table = Table(f"Suites of {tests} {kind} tests in pytest, ms per test")
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(version=version))
        fifty = cluster.template("fifty", build=tables)
        plain = stack.enter_context(PgTempDB(version=version, dbname="fifty", password="x"))
        tables(plain.uri)
        by_hand = f"host={plain.host} port={plain.port} user=postgres password=x"
        servers: dict[str, Callable[[], str]] = {
            "pytest-postgresql, tmpfs": lambda: stack.enter_context(
                pytest_postgresql_server(version, Path("/dev/shm"))
            ),
            "pytest-postgresql, its own place": lambda: stack.enter_context(
                pytest_postgresql_server(version, Path(tempfile.gettempdir()))
            ),
        }
        served = {way: servers[way]() for way in ways if way in servers}
        for _ in range(rounds):
            table.add(BASE, two_connections(cluster, fifty.dbname))
            for way in ways:
                try:
                    table.add(way, suite(way, kind, tests, served.get(way, by_hand)))
                except RuntimeError as error:
                    table.add(way, str(error))
    table.show(BASE)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--version", default="18")
    parser.add_argument("--tests", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kind", action="append", choices=("trivial", "computing", "waiting"))
    parser.add_argument("--way", action="append", choices=list(CONFTESTS))
    parser.add_argument("--keep", type=Path, help="a directory for the samples, for docs/peers.py")
    given = parser.parse_args()
    elsewhere = paths.filesystem_type(Path(tempfile.gettempdir()))
    release = search.find(None, given.version).version
    description = (
        f"{machine('bench.suites', release)} The directory of `its own place` is on {elsewhere}."
    )
    print(description)
    if given.keep is not None:
        given.keep.mkdir(parents=True, exist_ok=True)
    os.environ["PGTEMP_VERSION"] = given.version
    for kind in given.kind or ("trivial", "computing", "waiting"):
        ways = given.way or list(CONFTESTS)
        table = measure(given.version, kind, ways, given.tests, given.rounds)
        if given.keep is not None:
            table.save(given.keep, f"pytest-{kind}", BASE, description)


if __name__ == "__main__":
    sys.exit(main())
