"""What a server says of itself, and what there is to say when it has died."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pgtemp.errors import ClusterError, DiskFullError
from pgtemp.host import disk_space
from pgtemp.host.tree import Tree

_LOG_TAIL = 12
_TAIL_BYTES = 16 << 10
_PID_FILE_BYTES = 4096


def status(data_dir: Path, pid: int) -> str:
    """What a postmaster says of its state: "starting", "ready", "stopping"; "" for nothing.

    PostgreSQL writes it into postmaster.pid (PostgreSQL docs, 67.1); the pid there tells it from
    the file of an earlier server.
    """
    try:
        with Tree.open(data_dir) as data:
            text = data.read("postmaster.pid", _PID_FILE_BYTES)
    except OSError:
        return ""
    lines = text.decode(errors="replace").split("\n")
    return lines[7].strip() if len(lines) > 7 and lines[0] == str(pid) else ""


def log_tail(path: Path) -> list[str]:
    """The last lines of a server's log."""
    said = read_log(path, -_TAIL_BYTES).decode(errors="replace")
    return [line.rstrip() for line in said.splitlines()[-_LOG_TAIL:]]


def read_log(path: Path, offset: int, most: int = sys.maxsize) -> bytes:
    """A server's log from some place on, below zero from its end; b"" where there is none.

    Args:
        most: bytes, which are the last ones of that.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as log:
            size = os.fstat(log.fileno()).st_size
            log.seek(max(0, offset if offset >= 0 else size + offset, size - most))
            return log.read()
    except OSError:
        return b""


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
    if disk_space.is_full(place) or disk_space.says_full("\n".join(log)):
        return DiskFullError(
            f"PostgreSQL (pid {pid}) {how}: {place} is full ({disk_space.left(place)})",
            remedy=disk_space.REMEDY,
            details=log,
        )
    return ClusterError(
        f"PostgreSQL (pid {pid}) {how}", remedy="the end of its log says why", details=log
    )
