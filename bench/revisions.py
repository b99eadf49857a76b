"""Compare the speed of two checkouts of pgtemp in one run.

git worktree add ../before REVISION
    python -m bench.revisions ../before

The two alternate; each sample runs in its own processes, with this environment's packages.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.report import Table

ROOT = Path(__file__).resolve().parents[1]
_WARM_START = """
import time
from pgtemp import PgTempDB
PgTempDB().start().stop()
for _ in range(STARTS):
    start = time.perf_counter()
    with PgTempDB() as db:
        with db.connect() as connection:
            connection.execute("SELECT 1").fetchone()
            print((time.perf_counter() - start) * 1000)
"""
# As in bench.connections: the client pauses before it connects again.
_DAEMON = """
import statistics, sys, time, psycopg
uri = sys.argv[1]
def lease():
    start = time.perf_counter()
    with psycopg.connect(uri) as connection:
        connection.execute("SELECT count(*) FROM pg_class").fetchone()
        return (time.perf_counter() - start) * 1000
for _ in range(20):
    lease()
rested = []
for _ in range(LEASES):
    time.sleep(0.05)
    rested.append(lease())
start = time.perf_counter()
for _ in range(LEASES):
    lease()
print(statistics.median(rested), (time.perf_counter() - start) * 1000 / LEASES)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("other", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--leases", type=int, default=100)
    options = parser.parse_args()
    trees = {"before": options.other.resolve(), "after": ROOT}
    warm = Table(f"warm start to the first row, {options.starts} starts a sample")
    rested = Table(f"connect to first row through the daemon, {options.leases} leases a sample")
    sustained = Table("sustained: milliseconds for each lease, one client")
    with tempfile.TemporaryDirectory() as directory:
        for number in range(options.rounds + 1):
            for name, tree in [*trees.items()][:: 1 if number % 2 else -1]:
                os.chmod(directory, 0o755)
                cache = Path(directory, name)
                cache.mkdir(exist_ok=True)
                environment = {
                    **os.environ, "PYTHONPATH": str(tree / "src"), "PGTEMP_CACHE_DIR": str(cache),
                }  # fmt: skip
                script = _WARM_START.replace("STARTS", str(options.starts))
                starts = sorted(float(line) for line in _run(script, [], environment))
                medians = _through_a_daemon(environment, options.leases)
                if number > 0:  # the first round builds images
                    warm.add(name, starts[len(starts) // 2])
                    rested.add(name, medians[0])
                    sustained.add(name, medians[1])
    for table in (warm, rested, sustained):
        table.show("before")


def _run(script: str, arguments: list[str], environment: dict[str, str]) -> list[str]:
    argv = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.split()


def _through_a_daemon(environment: dict[str, str], leases: int) -> tuple[float, float]:
    uri = "postgresql://postgres@127.0.0.1:29871/test"
    argv = [sys.executable, "-m", "pgtemp", "serve", uri]
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        daemon.stdout.readline()
        try:
            output = _run(_DAEMON.replace("LEASES", str(leases)), [uri], environment)
        finally:
            daemon.terminate()
            daemon.stdout.read()
    return float(output[0]), float(output[1])


if __name__ == "__main__":
    main()
