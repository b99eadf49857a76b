"""Storms: clients that do their worst, in an order that a seed decides, and what holds after them.

`PGTEMP_CHAOS_SEED=7` asks for the storm of another seed.
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

from support import Daemon, eventually

SEED = int(os.environ.get("PGTEMP_CHAOS_SEED", "20"))
CLIENTS = 8
Gather = Callable[[str, int], Storm]
BOTH = pytest.mark.parametrize("isolation", ["database", "cluster"])
# Descriptors, threads and homes that a daemon may hold more than before the storm: what is kept
# ready, and opened ahead for a minute. Whatever each client or each crash would leave is more.
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
def gather(disk: tuple[Path, bool], tmp_path: Path) -> Iterator[Gather]:
    """Starts storms' daemons; ends those that the test has not ended."""
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
    for one in list(Daemon.running):
        one.end()


def weather(one: Storm, steps: int, more: tuple[int, ...] = MORE_AT_ONCE) -> None:
    """A whole storm, and a daemon that is afterwards what it was before."""
    try:
        one.aftermath()
        before = one.held()
        one.run(CLIENTS, steps)
        one.aftermath()
        assert not one.violations
        assert eventually(
            lambda: all(
                now <= then + some for now, then, some in zip(one.held(), before, more, strict=True)
            ),
            90,
        ), f"descriptors, threads and homes: {before}, and now {one.held()}"
        status, errors = one.served.end()
        check_the_end(one, status, errors)
        assert status == 0
    except BaseException as error:
        raise AssertionError(f"{error!r}\n{one.story()}") from error


def check_the_end(one: Storm, status: int, errors: str) -> None:
    assert "Traceback" not in errors
    assert eventually(lambda: not one.remains(), 30), one.remains()


@pytest.mark.slow
@BOTH
def test_a_storm(gather: Gather, isolation: str) -> None:
    """Nobody hangs, nobody reads another's rows, everybody is told why, and nothing is left."""
    weather(gather(isolation, SEED), 15)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(("more", "held"), [(1, MORE_AT_ONCE), (2, MORE_LATER)])
def test_more_storms(gather: Gather, isolation: str, more: int, held: tuple[int, ...]) -> None:
    """The same with other seeds, and longer; a minute later the daemon holds next to nothing."""
    weather(gather(isolation, SEED + more), 35, held)


@pytest.mark.parametrize(
    ("isolation", "number"),
    [
        ("database", signal.SIGTERM),
        pytest.param("cluster", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("database", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("cluster", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_an_end_in_the_middle_of_a_storm(
    gather: Gather, disk: tuple[Path, bool], isolation: str, number: int
) -> None:
    """However the daemon ends, nobody is left hanging, and nothing is left."""
    one = gather(isolation, SEED + number)
    try:
        with ThreadPoolExecutor(1) as thread:
            ending = thread.submit(one.end_after, 40, number)
            one.run(CLIENTS, 60)
            status, errors = ending.result()
        assert not one.violations
        if number == signal.SIGKILL:
            # What a warden left that was killed before, the next start takes.
            Daemon("--data-dir-prefix", str(disk[0])).end()
        check_the_end(one, status, errors)
        assert status == (0 if number == signal.SIGTERM else -number)
    except BaseException as error:
        raise AssertionError(f"{error!r}\n{one.story()}") from error
