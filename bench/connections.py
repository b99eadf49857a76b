"""A connection to a new database through the daemon, relative to one to an existing database.

python -m bench.connections [--version 18] [--rounds 30] [--leases 5000]

Each sample is the time from connect to the first row, with pauses in which the pool can refill.
"direct" is TCP to a server without a password and to an existing database. "seen before" are
clients with parameters that the daemon knows; those of "never seen" are new to it. Then there are
many leases in a row: the time and the daemon's memory for each tenth of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import psycopg

from bench.report import Table
from pgtemp import PgTempDB
from pgtemp.host import ports

PACE = 0.05


@contextmanager
def daemon(version: str) -> Iterator[tuple[str, int]]:
    """The daemon's URI and its pid."""
    uri = f"postgresql://postgres@127.0.0.1:{ports.free_port('127.0.0.1')}/bench"
    command = [sys.executable, "-m", "pgtemp", "--pg-version", version, uri]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "Ctrl-C" not in process.stdout.readline():
            pass
        yield uri, process.pid
        process.terminate()
        process.communicate()


def by_psycopg(uri: str) -> float:
    start = time.perf_counter()
    connection = psycopg.connect(uri)
    connection.execute("SELECT 1").fetchone()
    elapsed = time.perf_counter() - start
    connection.close()
    return elapsed * 1000


def by_asyncpg(uri: str) -> float:
    async def use() -> float:
        start = time.perf_counter()
        connection = await asyncpg.connect(uri)
        await connection.fetchval("SELECT 1")
        elapsed = time.perf_counter() - start
        await connection.close()
        return elapsed * 1000

    return asyncio.run(use())


def memory(pid: int) -> float:
    """Proportional set size of a process in megabytes."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.M)
    assert found is not None
    return int(found[1]) / 1024


def compare(direct: str, uri: str, rounds: int) -> None:
    for name, connect in (("psycopg", by_psycopg), ("asyncpg", by_asyncpg)):
        table = Table(f"{name}: connect to first row, ms")
        ways: dict[str, Callable[[int], float]] = {
            "direct, a database that exists": lambda turn, c=connect: c(direct),
            "daemon, a new database, seen before": lambda turn, c=connect: c(uri),
            "daemon, a new database, never seen": lambda turn, c=connect: c(
                f"{uri}?application_name=bench{turn}"
            ),
        }
        for turn in range(rounds + 3):
            for way, sample in ways.items():
                time.sleep(PACE)
                elapsed = sample(turn)
                if turn >= 3:
                    table.add(way, elapsed)
        table.show(base="direct, a database that exists")


def in_a_row(uri: str, pid: int, leases: int) -> None:
    tenth = leases // 10
    print(f"\n{leases} leases in a row, psycopg, no pause")
    print(f"{'':20}{'ms, median':>12}{'ms, 99 %':>10}{'daemon, MB':>12}")
    for part in range(10):
        samples = sorted(by_psycopg(uri) for _ in range(tenth))
        until = (part + 1) * tenth
        print(
            f"{f'up to {until}':20}{samples[tenth // 2]:12.2f}"
            f"{samples[int(tenth * 0.99)]:10.2f}{memory(pid):12.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", default="18")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--leases", type=int, default=5000)
    given = parser.parse_args()
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.release()}")
    print(f"PostgreSQL {given.version}")
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as hba:
        hba.write("host all all all trust\n")
        hba.flush()
        Path(hba.name).chmod(0o644)
        with (
            PgTempDB(version=given.version, pg_hba_conf=hba.name) as db,
            daemon(given.version) as (uri, pid),
        ):
            compare(db.uri, uri, given.rounds)
            if given.leases:
                in_a_row(uri, pid, given.leases)


if __name__ == "__main__":
    sys.exit(main())
