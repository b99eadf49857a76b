"""Locks between processes, by flock(2).

No library is used, because none gives access to its descriptor. Here the descriptor is inherited by
initdb and sent to the supervisor, so that a lock lasts exactly as long as the processes that need
it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pgtemp.host.openat import Closing

_OPEN = os.O_RDWR | os.O_CLOEXEC


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[int]:
    """Wait for the lock on the file at `path`, hold it for a block, and yield its descriptor.

    Raises OSError if the file cannot be created.
    """
    with Closing(os.open(path, _OPEN | os.O_CREAT, 0o600)) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield descriptor


@contextmanager
def locked_at_once(path: Path) -> Iterator[bool]:
    """Try to lock the file at `path` without waiting; yield whether that worked. Raises OSError."""
    with Closing(os.open(path, _OPEN | os.O_CREAT, 0o600)) as descriptor:
        yield _acquired(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on the file at `path`; False if the file is missing."""
    try:
        descriptor = os.open(path, _OPEN)
    except FileNotFoundError:
        return False
    with Closing(descriptor):
        return not _acquired(descriptor)


def _acquired(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def create_locked(path: Path, content: bytes) -> int:
    """Create a file that is locked from the moment it has its name; return its descriptor."""
    fresh = path.with_name(path.name + ".new")
    descriptor = os.open(fresh, _OPEN | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, content)
        os.rename(fresh, path)
    except BaseException:
        os.close(descriptor)
        fresh.unlink(missing_ok=True)
        raise
    return descriptor
