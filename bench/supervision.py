"""What it costs that nothing outlives its owner, and how soon all is gone.

    python -m bench.supervision [--rounds 20]

The first start of a process with its warden still to be started, against one whose warden runs
already, alternating, each in a process of its own; the warden's memory; the time from SIGKILL of an
owner, its server idle or busy, until no process and no directory is left. Milliseconds, megabytes.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.report import Table

_START = """
import time
from pgtemp import PgTempDB
from pgtemp.server import warden
{before}
start = time.perf_counter()
db = PgTempDB().start()
print((time.perf_counter() - start) * 1000)
db.stop()
"""
# Asked something, so that it is known to wait for work.
_WARDEN_FIRST = "warden.current().hold([], keep=False, lease=0, log=0).halt()"
_OWNER = """
import signal
from pgtemp import PgTempDB
from pgtemp.server import warden
db = PgTempDB().start()
print(warden.current().pid, db.data_dir, flush=True)
connection = db.connect()
{then}
signal.pause()
"""
_BUSY = "print(flush=True); connection.execute('DO $$ BEGIN LOOP END LOOP; END $$')"


def first_start(before: str) -> float:
    said = subprocess.run(
        [sys.executable, "-c", _START.format(before=before)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return float(said)


def after_kill(then: str) -> tuple[float, float]:
    """Milliseconds until all is gone, and megabytes that the warden had."""
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
    while Path(data_dir).parent.exists() or _lives(pid) or _any_in(data_dir):
        time.sleep(0.001)
    elapsed = (time.perf_counter() - start) * 1000
    owner.wait()
    owner.stdout.close()
    return elapsed, memory


def _resident(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _any_in(data_dir: str) -> bool:
    from pgtemp.server.remains import postgres_in

    return bool(postgres_in(data_dir))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    first_start("")  # may run initdb
    starts = Table("first start of a process, ms")
    gone = Table("from SIGKILL of the owner until nothing is left, ms")
    memory = 0.0
    for _ in range(rounds):
        starts.add("its warden runs already", first_start(_WARDEN_FIRST))
        starts.add("its warden is started with it", first_start(""))
        for name, then in (("an idle client", ""), ("a busy loop", _BUSY)):
            elapsed, used = after_kill(then)
            memory = max(memory, used)
            gone.add(name, elapsed)
    starts.show(base="its warden runs already")
    gone.show(base="an idle client")
    print(f"\nthe warden's resident memory: {memory:.1f} MB at the most")


if __name__ == "__main__":
    main()
