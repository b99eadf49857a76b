"""The cost of supervision, and the time until everything is cleaned up.

python -m bench.supervision [--rounds 20]

Measured are: the first start of a process, with and without a running supervisor, alternating, each
in its own process; the supervisor's memory; the time from SIGKILL of an owner, with an idle or busy
server, until no process and no directory is left; the time until a daemon leases again after a
backend or the postmaster was killed; and the time until the daemon exits, also as process 1. The
units are milliseconds and megabytes.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psycopg

from bench.report import Table
from pgtemp.host import ports
from pgtemp.supervisor.crash import postgres_in

_START = """
import time
from pgtemp import PgTempDB
from pgtemp.supervisor import supervision
{before}
start = time.perf_counter()
db = PgTempDB().start()
print((time.perf_counter() - start) * 1000)
db.stop()
"""
# One request, so that the supervisor is known to wait for work.
_SUPERVISOR_FIRST = "supervision.current().hold([], keep=False, lease=0, log=0).halt()"
_OWNER = """
import signal
from pgtemp import PgTempDB
from pgtemp.supervisor import supervision
db = PgTempDB().start()
print(supervision.current().pid, db.data_dir, flush=True)
connection = db.connect()
{then}
signal.pause()
"""
PROCESS_1 = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
CRASHES = (
    ("a backend, SIGSEGV", signal.SIGSEGV, "pg_backend_pid()"),
    ("the postmaster, SIGKILL", signal.SIGKILL,
     "(string_to_array(pg_read_file('postmaster.pid'), E'\\n'))[1]"),
)  # fmt: skip
_BUSY = "print(flush=True); connection.execute('DO $$ BEGIN LOOP END LOOP; END $$')"


def first_start(before: str) -> float:
    output = subprocess.run(
        [sys.executable, "-c", _START.format(before=before)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return float(output)


def after_kill(then: str) -> tuple[float, float]:
    """Milliseconds until everything is cleaned up, and the supervisor's memory in megabytes."""
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER.format(then=then)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pid, data_dir = owner.stdout.readline().split()
    memory = _resident(int(pid))
    if then == _BUSY:
        owner.stdout.readline()
    start = time.perf_counter()
    owner.send_signal(signal.SIGKILL)
    while Path(data_dir).parent.exists() or _is_running(pid) or postgres_in(data_dir):
        time.sleep(0.001)
    elapsed = (time.perf_counter() - start) * 1000
    owner.wait()
    owner.stdout.close()
    return elapsed, memory


class Served:
    """A daemon for a block."""

    def __init__(self, before: Sequence[str] = ()) -> None:
        self.uri = f"postgresql://me@localhost:{ports.free_port('127.0.0.1')}/app"
        argv = [*before, sys.executable, "-m", "pgtemp", self.uri]
        self.process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        while "Ctrl-C" not in self.process.stdout.readline():
            pass

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(self.process.pid)

    def end(self, pid: int) -> float:
        start = time.perf_counter()
        os.kill(pid, signal.SIGTERM)
        self.process.wait()
        elapsed = (time.perf_counter() - start) * 1000
        assert self.process.stdout is not None
        self.process.stdout.close()
        return elapsed


def after_crash(number: int, target: str) -> float:
    """Milliseconds from a kill within one lease until the next lease's first row."""
    with Served() as served, psycopg.connect(served.uri, autocommit=True) as victim:
        row = victim.execute(f"SELECT {target}").fetchone()  # type: ignore[arg-type]
        assert row is not None
        start = time.perf_counter()
        os.kill(int(row[0]), number)
        while True:
            try:
                with psycopg.connect(served.uri) as connection:
                    connection.execute("SELECT 1")
                    return (time.perf_counter() - start) * 1000
            except psycopg.OperationalError:
                time.sleep(0.001)


def end_of_daemon(before: Sequence[str]) -> float:
    served = Served(before)
    busy = psycopg.connect(served.uri)
    busy.pgconn.send_query(b"DO $$ BEGIN LOOP END LOOP; END $$")
    pid = served.process.pid
    if before:
        pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
    elapsed = served.end(pid)
    busy.close()
    return elapsed


def _resident(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    first_start("")  # this may run initdb
    starts = Table("first start of a process, ms")
    removal = Table("from SIGKILL of the owner until nothing is left, ms")
    crashes = Table("from a kill within a lease until the next lease's first row, ms")
    ends = Table("from SIGTERM until the daemon has exited, ms")
    memory = 0.0
    for _ in range(rounds):
        starts.add("with a running supervisor", first_start(_SUPERVISOR_FIRST))
        starts.add("with the start of the supervisor", first_start(""))
        for name, then in (("an idle client", ""), ("a busy loop", _BUSY)):
            elapsed, used = after_kill(then)
            memory = max(memory, used)
            removal.add(name, elapsed)
        for name, number, target in CRASHES:
            crashes.add(name, after_crash(number, target))
        ends.add("a daemon with a busy client", end_of_daemon([]))
        if os.geteuid() == 0:
            ends.add("the same as process 1", end_of_daemon(PROCESS_1))
    starts.show(base="with a running supervisor")
    removal.show(base="an idle client")
    crashes.show(base=CRASHES[0][0])
    ends.show(base="a daemon with a busy client")
    print(f"\nthe supervisor's resident memory: at most {memory:.1f} MB")


if __name__ == "__main__":
    main()
