"""The status that a server records, its log, and the error for a server that has exited."""

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
    """The state that a postmaster records: "starting", "ready" or "stopping"; "" if there is none.

    PostgreSQL writes it to postmaster.pid (PostgreSQL docs, "Database File Layout"); the pid in
    that file shows that the file does not belong to an earlier server.
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
    text = read_log(path, -_TAIL_BYTES).decode(errors="replace")
    return [line.rstrip() for line in text.splitlines()[-_LOG_TAIL:]]


def read_log(path: Path, offset: int, limit: int = sys.maxsize) -> bytes:
    """A server's log from `offset` to its end; b"" if there is no log.

    Args:
        offset: in bytes; a negative offset counts from the end.
        limit: return at most this many bytes, the last ones.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as log:
            size = os.fstat(log.fileno()).st_size
            log.seek(max(0, offset if offset >= 0 else size + offset, size - limit))
            return log.read()
    except OSError:
        return b""


def exit_error(pid: int, status: int | None, run_dir: Path, log: Sequence[str]) -> ClusterError:
    """The error for a postmaster that has exited.

    Args:
        status: if negative, the negated number of the signal that terminated it; None if unknown.
        run_dir: its run directory.
        log: the end of its log.
    """
    how = "stopped"
    if status is not None and status < 0:
        how = f"was killed by signal {-status}"
    # The log may be on the full disk itself and lack the message, so the disk is checked as well.
    if disk_space.is_full(run_dir) or disk_space.says_full("\n".join(log)):
        return DiskFullError(
            f"PostgreSQL (pid {pid}) {how}: {run_dir} is full ({disk_space.free_text(run_dir)})",
            remedy=disk_space.REMEDY,
            details=log,
        )
    return ClusterError(
        f"PostgreSQL (pid {pid}) {how}", remedy="see the end of its log", details=log
    )
