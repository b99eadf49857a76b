"""Helpers of several tests: waiting with a deadline, and a daemon as a real process."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import ClassVar, Self

import psycopg
import pytest

from pgtemp.host import paths, ports
from pgtemp.supervisor.leftovers import PREFIX


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether a condition becomes true within a deadline."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.01)
    return True


def homes() -> set[Path]:
    """The existing run directories, in the usual base directories."""
    return {home for base in paths.sweep_bases() for home in base.glob(f"{PREFIX}*")}


OTHER_UID = 54321  # the uid of a user that runs no process


@contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """In the block, this thread creates sockets and files as another user (setfsuid(2))."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    libc = ctypes.CDLL(None)
    libc.setfsuid(uid)
    try:
        yield
    finally:
        libc.setfsuid(os.geteuid())


@contextmanager
def many_files() -> Iterator[None]:
    """In the block, this process may open as many files as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def children(pid: int) -> dict[int, str]:
    """The child processes of a process, with their names."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread or a child that has exited
            for child in task.read_text().split():
                found[int(child)] = Path(f"/proc/{child}/comm").read_text().strip()
    return found


def own_memory(pid: int) -> int:
    """Bytes of memory that only this process has written.

    A page that it shares becomes its own when the other processes exit.
    """
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    (line,) = (line for line in rollup.splitlines() if line.startswith("Private_Dirty:"))
    return int(line.split()[1]) << 10


class Daemon:
    """`pgtemp ARGUMENTS postgresql://localhost:PORT/test` in its own process."""

    running: ClassVar[set[Self]] = set()

    def __init__(
        self,
        *arguments: str,
        dbname: str = "test",
        env: dict[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> None:
        self.port = ports.free_port("127.0.0.1")
        self.uri = f"postgresql://postgres@localhost:{self.port}/{dbname}"
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "pgtemp", *arguments, self.uri],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
            text=True,
        )
        Daemon.running.add(self)
        self.output = self._await_line("Ctrl-C")

    def _await_line(self, word: str) -> list[str]:
        assert self.process.stdout is not None
        lines: list[str] = []
        too_long = threading.Timer(60, self.process.kill)
        too_long.start()
        while word not in "".join(lines[-1:]):
            line = self.process.stdout.readline()
            if not line:
                _, errors = self.end(signal.SIGKILL)
                raise AssertionError(f"the daemon did not start: {lines} {errors}")
            lines.append(line)
        too_long.cancel()
        return lines

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; return the exit status and the standard error."""
        Daemon.running.discard(self)
        with closing(self.process.stdout), closing(self.process.stderr):  # type: ignore[type-var]
            self.process.send_signal(number)
            _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


def run_pgtemp(
    *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `pgtemp ARGUMENTS` and wait until it exits."""
    return subprocess.run(
        [sys.executable, "-m", "pgtemp", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **(env or {})},
    )


def at(served: Daemon, dbname: str, user: str = "postgres") -> str:
    """The URL of a database of a daemon."""
    return f"postgresql://{user}@127.0.0.1:{served.port}/{dbname}"


def one(uri: str, query: str) -> object:
    """The first value of a query, through a new connection."""
    with psycopg.connect(uri, autocommit=True) as connection:
        row = connection.execute(query).fetchone()  # type: ignore[arg-type]
        assert row is not None
        return row[0]
