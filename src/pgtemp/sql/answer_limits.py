"""How long pgtemp waits for an answer of a server.

A superuser in a server can stop its processes (SIGSTOP), put another program behind its socket, or
run code that never ends. So each wait for an answer ends, if not with the answer then with
NoAnswerError. Heavyweight locks are limited by the server itself (`lock_timeout`).
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
# pgtemp's statements read and write catalogs, which takes milliseconds. The rest is for a machine
# with far more work than cores.
ANSWER_SECONDS = 10.0
LOCK_SECONDS = 5.0  # no session but one that means harm locks a shared catalog for longer
# Of statements in which a server reads all of a database, such as VACUUM.
LONG_SECONDS = 600.0
_COPIED_PER_SECOND = 1 << 20  # bytes, by the slowest disk
_LOOK_SECONDS = 1.0
# psycopg wakes up ten times a second. A longer pause is one of this process (SIGSTOP, a suspended
# machine), for which the server is not to blame.
_PAUSE_SECONDS = 0.2


class NoAnswerError(psycopg.OperationalError):
    """The server did not answer in time; the connection is closed."""


def seconds_to_copy(size: int) -> float:
    """The time in which CREATE DATABASE answers, for a source of so many bytes."""
    return ANSWER_SECONDS + size / _COPIED_PER_SECOND


def limited(waiting: PQGen[T], seconds: float, check: Callable[[], None]) -> PQGen[T]:
    """Wrap what psycopg waits for, so that it takes no longer than so many seconds.

    Args:
        check: called once a second; raises to end the wait.

    Raises:
        NoAnswerError: there was no complete answer.
    """
    waited, look = 0.0, _LOOK_SECONDS
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
            if waited > look:
                look += _LOOK_SECONDS
                check()
    except StopIteration as end:
        result: T = end.value
        return result


def check_running(home: Path) -> None:
    """Raise NoAnswerError if a process of the server in this home is stopped."""
    stopped = [pid for pid in postgres_in(str(home / DATA)) if procfs.is_stopped(pid)]
    if stopped:
        pids = ", ".join(map(str, stopped))
        raise NoAnswerError(f"processes of the server are stopped (SIGSTOP): pid {pids}")
