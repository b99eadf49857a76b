"""Storms: clients misbehave in an order that a seed decides; then the tests check the daemon.

`PGTEMP_CHAOS_SEED=7` selects the storm of another seed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chaos import TEMPLATE, Served, Storm
from chaos_steps import IDLE_SECONDS

from pgtemp.supervisor.leftovers import PREFIX
from support import Daemon, eventually

SEED = int(os.environ.get("PGTEMP_CHAOS_SEED", "20"))
CLIENTS = 8
StartStorm = Callable[[str, int], Storm]
BOTH = pytest.mark.parametrize("isolation", ["database", "cluster"])
# Descriptors, threads and run directories that a daemon may hold in addition to those before the
# storm: databases in the pool, and connections that stay warm for a minute. A leak per client or
# per crash would be more.
MORE_AT_ONCE, MORE_LATER = (100, 40, 24), (40, 40, 6)


@pytest.fixture
def disk() -> Iterator[tuple[Path, bool]]:
    """A directory for servers, and whether it is a small disk, which only root can mount."""
    path = Path(tempfile.mkdtemp(prefix="test-of-chaos-"))
    path.chmod(0o1777)
    mount = ["mount", "-t", "tmpfs", "-o", "size=700m,mode=1777", "tmpfs", str(path)]
    small = (
        os.geteuid() == 0
        and subprocess.run(mount, check=False, stderr=subprocess.DEVNULL).returncode == 0
    )
    yield path, small
    if small:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
    path.rmdir()


@pytest.fixture
def start_storm(disk: tuple[Path, bool], tmp_path: Path) -> Iterator[StartStorm]:
    """Starts the daemons of storms; stops those that the test has not stopped."""
    path, small_disk = disk
    template = tmp_path / "template.sql"
    template.write_text(TEMPLATE)

    def start(isolation: str, seed: int) -> Storm:
        served = Served(
            "--isolation", isolation, "--template", f"app={template}",
            "--data-dir-prefix", str(path), "--linger", "0.3", "--wait", "1",
            "--max-databases", "6", "--max-connections-per-lease", "3",
            "--idle-ttl", str(IDLE_SECONDS),
            "-o", "max_prepared_transactions=20", "-o", "wal_level=logical",
        )  # fmt: skip
        return Storm(served, seed, path, small_disk=small_disk)

    yield start
    for storm in list(Daemon.running):
        storm.end()


def run_storm(storm: Storm, steps: int, more: tuple[int, ...] = MORE_AT_ONCE) -> None:
    """Run a whole storm; afterwards the daemon must hold no more than before."""
    try:
        storm.check_service()
        before = storm.held()
        storm.run(CLIENTS, steps)
        storm.check_service()
        assert not storm.violations
        assert eventually(
            lambda: all(
                now <= then + some
                for now, then, some in zip(storm.held(), before, more, strict=True)
            ),
            90,
        ), f"descriptors, threads and homes: {before}, and now {storm.held()}"
        status, errors = storm.served.end()
        check_nothing_left(storm, status, errors)
        assert status == 0
    except BaseException as error:
        raise AssertionError(f"{error!r}\n{storm.story()}") from error


def check_nothing_left(storm: Storm, status: int, errors: str) -> None:
    assert "Traceback" not in errors
    # The next start sweeps the run directories of a supervisor that was killed before, and those
    # that were never finished after an hour.
    for path in storm.place.glob(f"{PREFIX}*"):
        os.utime(path, (0, 0))
    Daemon("--data-dir-prefix", str(storm.place)).end()
    assert eventually(lambda: not storm.leftovers(), 30), storm.leftovers()


@pytest.mark.slow
@BOTH
def test_a_storm(start_storm: StartStorm, isolation: str) -> None:
    """No client hangs or reads another's rows; each gets a reason, and nothing is left."""
    run_storm(start_storm(isolation, SEED), 15)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(("more", "held"), [(1, MORE_AT_ONCE), (2, MORE_LATER)])
def test_more_storms(
    start_storm: StartStorm, isolation: str, more: int, held: tuple[int, ...]
) -> None:
    """The same with other seeds, and longer. A minute later the daemon holds almost nothing."""
    run_storm(start_storm(isolation, SEED + more), 35, held)


@pytest.mark.parametrize(
    ("isolation", "number"),
    [
        ("database", signal.SIGTERM),
        pytest.param("cluster", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("database", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("cluster", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_daemon_that_stops_during_a_storm(
    start_storm: StartStorm, isolation: str, number: int
) -> None:
    """However the daemon ends, no client hangs, and nothing is left."""
    storm = start_storm(isolation, SEED + number)
    try:
        with ThreadPoolExecutor(1) as thread:
            ending = thread.submit(storm.end_after, 40, number)
            storm.run(CLIENTS, 60)
            status, errors = ending.result()
        assert not storm.violations
        check_nothing_left(storm, status, errors)
        assert status == (0 if number == signal.SIGTERM else -number)
    except BaseException as error:
        raise AssertionError(f"{error!r}\n{storm.story()}") from error
