"""What a server says of itself, and what there is to say when it has died."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pgtemp.errors import ClusterError, DiskFullError
from pgtemp.host import room

_LOG_TAIL = 12
_TAIL_BYTES = 16 << 10
_CAREFUL = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


def status(data_dir: Path, pid: int) -> str:
    """What a postmaster says of its state: "starting", "ready", "stopping"; "" for nothing.

    PostgreSQL writes it into postmaster.pid (PostgreSQL docs, 67.1); the pid there tells it from
    the file of an earlier server.
    """
    try:  # without a file object, since this is asked for each lease
        file = os.open(f"{data_dir}/postmaster.pid", os.O_RDONLY | _CAREFUL)
    except OSError:
        return ""
    try:
        lines = os.read(file, 4096).decode(errors="replace").split("\n")
    finally:
        os.close(file)
    return lines[7].strip() if len(lines) > 7 and lines[0] == str(pid) else ""


def log_tail(path: Path) -> list[str]:
    """The last lines of a server's log."""
    try:
        with open(path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
            said = log.read().decode(errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in said.splitlines()[-_LOG_TAIL:]]


def death(pid: int, exit_status: int | None, place: Path, log: Sequence[str]) -> ClusterError:
    """The error for a postmaster that has ended.

    Args:
        exit_status: below zero, the signal that ended it; None is not known.
        place: where its data was.
        log: the end of its log.
    """
    how = "stopped"
    if exit_status is not None and exit_status < 0:
        how = f"was killed by signal {-exit_status}"
    # On a full disk the log may not say it, as it is there itself.
    if room.is_full(place) or room.says_full("\n".join(log)):
        return DiskFullError(
            f"PostgreSQL (pid {pid}) {how}: {place} is full ({room.left(place)})",
            remedy=room.REMEDY,
            details=log,
        )
    return ClusterError(
        f"PostgreSQL (pid {pid}) {how}", remedy="the end of its log says why", details=log
    )
