"""The time limits of pgtemp's waits for a server.

A superuser of a server can stop its processes (SIGSTOP), let another program listen on its socket,
or run code that never returns. Every wait for an answer therefore has a time limit, after which it
raises NoAnswerError. The server itself limits waits for heavyweight locks (`lock_timeout`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psycopg
from psycopg.abc import PQGen

from pgtemp.host import procfs
from pgtemp.supervisor.crash import postgres_in
from pgtemp.supervisor.leftovers import DATA

T = TypeVar("T")
# pgtemp's statements read and write catalogs, which takes milliseconds. The limit is far larger,
# because some machines run far more processes than they have cores.
ANSWER_SECONDS = 10.0
LOCK_SECONDS = 5.0  # only a malicious session locks a shared catalog for longer
# For statements that read a whole database, such as VACUUM.
LONG_SECONDS = 600.0
_COPIED_PER_SECOND = 1 << 20  # bytes, on the slowest disk
_CHECK_SECONDS = 1.0
# psycopg wakes up ten times a second. A longer pause means that this process did not run (SIGSTOP,
# a suspended machine); it does not count as time in which the server failed to answer.
_PAUSE_SECONDS = 0.2


class NoAnswerError(psycopg.OperationalError):
    """The server did not answer in time; the connection is closed."""


def seconds_to_copy(size: int) -> float:
    """Return the time limit of CREATE DATABASE in seconds, for a source of `size` bytes."""
    return ANSWER_SECONDS + size / _COPIED_PER_SECOND


def limited(waiting: PQGen[T], seconds: float, check: Callable[[], None]) -> PQGen[T]:
    """Wrap a generator that psycopg waits for, and limit the wait.

    Args:
        seconds: the limit.
        check: called once a second; it can raise to stop the wait.

    Raises:
        NoAnswerError: the complete answer did not arrive in time.
    """
    waited, next_check = 0.0, _CHECK_SECONDS
    before = time.monotonic()
    try:
        wanted = next(waiting)
        while True:
            ready = yield wanted
            wanted = waiting.send(ready)
            now = time.monotonic()
            waited += min(now - before, _PAUSE_SECONDS)
            before = now
            if waited > seconds:
                raise NoAnswerError(f"the server did not answer within {seconds:g} s")
            if waited > next_check:
                next_check += _CHECK_SECONDS
                check()
    except StopIteration as end:
        result: T = end.value
        return result


def check_running(run_dir: Path) -> None:
    """Raise NoAnswerError if a process of the server in this run directory is stopped."""
    stopped = [pid for pid in postgres_in(str(run_dir / DATA)) if procfs.is_stopped(pid)]
    if stopped:
        pids = ", ".join(map(str, stopped))
        raise NoAnswerError(f"processes of the server are stopped (SIGSTOP): pid {pids}")
