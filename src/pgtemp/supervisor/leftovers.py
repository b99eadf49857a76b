"""Remove what owners leave behind: complete, incomplete and partly removed run directories.

The supervisor process imports this module, so it imports no module that is slow to import. Whether
an owner is running is decided by a lock, never by a name or an age.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time

from pgtemp.host.openat import DIRECTORY, Closing, open_file, quietly
from pgtemp.host.removal import REMOVING, is_entry, remove_open
from pgtemp.supervisor.crash import clear

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgtemp.host.removal import Steps

PREFIX = "pgtemp-"
LEASE = "lease"
NEW = ".new"  # suffix of a file that gets its final name when it is complete
DATA = "data"
RECYCLED = "recycled"
SOCKET = "socket"
KEEP = b"keep\n"
DISCARD = b"discard\n"
# A directory without a lease file is being created, or was left unfinished. A sweep assumes the
# latter only after this many seconds.
UNFINISHED_SECONDS = 3600.0
_BASE = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FOREIGN = PermissionError(errno.EPERM, "it belongs to another user")
_SHARED = PermissionError(errno.EPERM, "other users may write to it")


def sweep(base: str) -> Iterator[None]:
    """Remove what exited owners left in `base`: first processes, then run directories."""
    try:
        parent = os.open(base, _BASE)
    except OSError:
        return
    with Closing(parent):
        for name in os.listdir(parent):
            if name.startswith(PREFIX):
                yield
                yield from sweep_directory(parent, name)


def sweep_directory(parent: int, name: str, everyone: bool = False) -> Steps:
    """Like `sweep`, for one run directory, an entry of `parent`.

    Every step uses the descriptor of the directory that was inspected, never its path.

    Args:
        everyone: also remove run directories of other users.

    Returns:
        The reason why the run directory still exists; None if it is removed, or no longer needs a
        sweep.
    """
    try:
        run_dir = os.open(name, DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        return None
    except OSError as error:
        quietly(_remove_dangling_link, parent, name)
        return error
    with Closing(run_dir):
        try:
            if os.fstat(run_dir).st_dev != os.fstat(parent).st_dev:
                return OSError(errno.EBUSY, "a file system is mounted there")
            refusal = _refusal(run_dir, everyone)
            if refusal is not None:
                return refusal
            try:
                lease = open_file(LEASE, run_dir)
            except FileNotFoundError:
                if not is_unfinished(run_dir, name):
                    return BlockingIOError(errno.EAGAIN, "it is being created")
                return (yield from remove_open(parent, name, run_dir))
            with Closing(lease):
                return (yield from _sweep_abandoned(parent, name, run_dir, lease))
        except OSError as error:
            return error


def _remove_dangling_link(parent: int, name: str) -> None:
    """Remove a dangling link to a socket directory (rundir.py), unless another user owns it."""
    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode) and status.st_uid == os.getuid():
        try:
            os.stat(name, dir_fd=parent)
        except FileNotFoundError:
            os.unlink(name, dir_fd=parent)


def _sweep_abandoned(parent: int, name: str, run_dir: int, lease: int) -> Steps:
    status, uid = os.fstat(lease), os.fstat(run_dir).st_uid
    # A user may be able to create a hard link to another user's file with the name of a lease file.
    if status.st_uid != uid or status.st_nlink != 1:
        return _FOREIGN
    if is_held(lease) or not is_entry(lease, run_dir, LEASE):
        return BlockingIOError(errno.EAGAIN, "its owner is running")
    try:
        data = os.open(DATA, DIRECTORY, dir_fd=run_dir)
    except OSError:
        pass
    else:
        with Closing(data):
            # A user may have moved the data directory of a third user's server into their own run
            # directory.
            if uid in (os.getuid(), os.fstat(data).st_uid):
                clear(data)
    if is_persisted(lease):
        os.unlink(LEASE, dir_fd=run_dir)
        return None
    return (yield from remove_open(parent, _rename_for_removal(parent, name, run_dir), run_dir))


def _refusal(run_dir: int, everyone: bool) -> OSError | None:
    """The reason why the caller must not sweep a run directory; None if it may."""
    status = os.fstat(run_dir)
    if status.st_uid != os.getuid() and not everyone:
        return _FOREIGN
    # If other users can write to it, any of them could have put a lease file into it.
    return _SHARED if status.st_mode & 0o022 else None


def _rename_for_removal(parent: int, name: str, run_dir: int) -> str:
    """Rename a run directory that is to be removed; return its name afterwards.

    The lease file is among the first files removed. If the removal is interrupted, the next sweep
    recognizes the new name and continues.
    """
    moved = name.removesuffix(REMOVING) + REMOVING
    quietly(os.rename, name, moved, src_dir_fd=parent, dst_dir_fd=parent)
    return moved if is_entry(run_dir, parent, moved) else name


def is_held(lease: int) -> bool:
    """Whether another process holds the lock of a lease file; if not, acquire it."""
    try:
        fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def is_persisted(lease: int) -> bool:
    """Whether a lease file states that the data is persisted."""
    return os.pread(lease, len(KEEP), 0) == KEEP


def is_unfinished(run_dir: int, name: str) -> bool:
    """Whether a directory without a lease file was left unfinished and may be removed.

    A directory that was renamed for removal may always be removed, any other directory only after
    `UNFINISHED_SECONDS`. Persisted data, the directory of failed tests or a cache may also have
    such a name, but they are not empty. Raises OSError.
    """
    if name.endswith(REMOVING):
        return True
    if time.time() - os.fstat(run_dir).st_mtime <= UNFINISHED_SECONDS:
        return False
    with os.scandir(run_dir) as entries:
        return all(entry.name == LEASE + NEW for entry in entries)
