"""Databases of one server: claims from the pool, the rate, and the effect of other databases.

python -m bench.databases [--version 18] [--rounds 10] [--most 1000]

The rate is that of claim, close, claim, close … until all claimed databases are dropped, relative
to a loop of CREATE DATABASE … STRATEGY file_copy and DROP DATABASE on one connection. Both
alternate on the same server. The last table has the same times while other databases exist.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg

from bench.report import Table
from pgtemp import Cluster, Database, Template
from pgtemp.host.disk_space import free_bytes

COUNT = 40  # databases in a sample
PACE = 0.05  # seconds between claims, so that the pool can refill


def tables(uri: str) -> None:
    """Fifty tables with four indexes each."""
    with psycopg.connect(uri) as connection:
        for i in range(50):
            connection.execute(f"CREATE TABLE t{i} (a int, b int, c int, d int)")
            for column in "abcd":
                connection.execute(f"CREATE INDEX ON t{i} ({column})")


def claim(template: Template) -> float:
    """Milliseconds for one claim, with pauses in which the pool can refill."""
    time.sleep(PACE)
    start = time.perf_counter()
    db = template.database()
    elapsed = time.perf_counter() - start
    db.close()
    return elapsed * 1000


def connect(cluster: Cluster) -> float:
    """Milliseconds for a direct connection to an existing database, to the first row."""
    start = time.perf_counter()
    with psycopg.connect(cluster.info.uri) as connection:
        connection.execute("SELECT 1").fetchone()
        return (time.perf_counter() - start) * 1000


def bare_loop(connection: psycopg.Connection, dbname: str) -> float:
    """Milliseconds per database, created and dropped on one connection."""
    start = time.perf_counter()
    for i in range(COUNT):
        connection.execute(f'CREATE DATABASE bare{i} TEMPLATE "{dbname}" STRATEGY file_copy')
        connection.execute(f"DROP DATABASE bare{i}")
    return (time.perf_counter() - start) * 1000 / COUNT


def sustained(template: Template, clients: int, watch: psycopg.Connection) -> float:
    """Milliseconds per database, claimed and closed by several clients, until all are dropped."""

    def use(_: int) -> str:
        with template.database() as db:
            return db.dbname

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        names = list(threads.map(use, range(COUNT)))
    count = "SELECT count(*) FROM pg_database WHERE datname = ANY(%s)"
    while watch.execute(count, [names]).fetchone()[0]:  # type: ignore[index]
        time.sleep(0.002)
    return (time.perf_counter() - start) * 1000 / COUNT


def growth(version: str, most: int) -> None:
    """With 1 to `most` databases in the server: create, drop, connect, claim."""
    print(f"\nwhile this number of databases exists, PostgreSQL {version}, ms, medians of 10")
    print(f"{'databases':>10}{'CREATE':>9}{'DROP':>9}{'connect':>9}{'claim':>9}{'MB each':>9}")
    with (
        Cluster(version=version) as cluster,
        psycopg.connect(cluster.info.uri, autocommit=True) as connection,
    ):
        template = cluster.template("nothing", build=lambda uri: None)
        held: list[Database] = []
        base = cluster.server.data_dir / "base"
        for count in (1, 10, 30, 100, 300, 1000):
            if count > most:
                break
            before, had = free_bytes(base), len(held)
            held += [template.database() for _ in range(count - len(held))]
            each = (before - free_bytes(base)) / max(1, len(held) - had) / (1 << 20)
            samples: list[list[float]] = [[], [], [], []]
            for _ in range(10):
                time.sleep(PACE)
                create = f'CREATE DATABASE one TEMPLATE "{template.dbname}" STRATEGY file_copy'
                samples[0].append(timed(lambda s=create: connection.execute(s)))
                samples[1].append(timed(lambda: connection.execute("DROP DATABASE one")))
                with template.database() as db:
                    samples[2].append(timed(lambda d=db: d.connect().close()))
                samples[3].append(claim(template))
            middles = "".join(f"{statistics.median(sample):9.2f}" for sample in samples)
            print(f"{count:10}{middles}{each:9.1f}")


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", default="18")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--most", type=int, default=1000)
    given = parser.parse_args()
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.release()}")
    with (
        Cluster(version=given.version) as cluster,
        psycopg.connect(cluster.info.uri, autocommit=True) as connection,
    ):
        first = Table(f"A claim, PostgreSQL {given.version}, ms")
        empty = cluster.template("nothing", build=lambda uri: None)
        ways: dict[str, Callable[[], float]] = {
            "direct connection, first row": lambda: connect(cluster),
            "claim from the warm pool": lambda: claim(empty),
        }
        for turn in range(given.rounds * 3 + 1):
            for name, way in ways.items():
                sample = way()
                if turn:
                    first.add(name, sample)
        first.show(base="direct connection, first row")
        for template in (empty, cluster.template("fifty tables", build=tables)):
            table = Table(f"ms a database, sustained, template {template.name!r}")
            for turn in range(given.rounds + 1):
                samples = {
                    "bare loop, one connection": bare_loop(connection, template.dbname),
                    "pgtemp, 1 client": sustained(template, 1, connection),
                    "pgtemp, 4 clients": sustained(template, 4, connection),
                }
                for name, sample in samples.items():
                    if turn:
                        table.add(name, sample)
            table.show(base="bare loop, one connection")
    growth(given.version, given.most)


if __name__ == "__main__":
    sys.exit(main())
