"""What owners leave behind, and taking it away: homes, half-made ones, what was set aside.

Shared by the warden's process, so it imports nothing that is slow. Liveness is told by a lock,
never by a name or an age.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time

from pgtemp.host.openat import DIRECTORY, open_file, quietly
from pgtemp.host.removal import ASIDE, is_entry, remove_open
from pgtemp.supervisor.crash import clear

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgtemp.host.removal import Steps

PREFIX = "pgtemp-"
LEASE = "lease"
NEW = ".new"  # of a file that gets its name when it is whole
DATA = "data"
SHELF = "shelf"
SOCKET = "socket"
KEEP = b"keep\n"
DISCARD = b"discard\n"
# A directory without a lease is being made right now, or was left half-made; only after this many
# seconds is it taken for the latter.
HALF_MADE = 3600.0
_BASE = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_ANOTHERS = PermissionError(errno.EPERM, "it belongs to another user")
_SHARED = PermissionError(errno.EPERM, "other users may write to it")


def sweep(base: str) -> Iterator[None]:
    """Take away what owners that are gone have left in `base`: processes, then directories."""
    try:
        parent = os.open(base, _BASE)
    except OSError:
        return
    try:
        for name in os.listdir(parent):
            if name.startswith(PREFIX):
                yield
                yield from sweep_home(parent, name)
    finally:
        os.close(parent)


def sweep_home(parent: int, name: str, everyone: bool = False) -> Steps:
    """The same for one home, an entry of `parent`.

    All is done through the descriptor of the directory that was inspected, never by its path.

    Args:
        everyone: also what other users' owners have left.

    Returns:
        Why the home is still there; None where it is gone, or no longer waits for a sweep.
    """
    try:
        home = os.open(name, DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        return None
    except OSError as error:
        quietly(_drop_dead_link, parent, name)
        return error
    try:
        if os.fstat(home).st_dev != os.fstat(parent).st_dev:
            return OSError(errno.EBUSY, "a file system is mounted there")
        try:
            lease = open_file(LEASE, home)
        except FileNotFoundError:
            return (yield from _sweep_half_made(parent, name, home, everyone))
        try:
            return (yield from _sweep_abandoned(parent, name, home, lease, everyone))
        finally:
            os.close(lease)
    except OSError as error:
        return error
    finally:
        os.close(home)


def _drop_dead_link(parent: int, name: str) -> None:
    """Drop a link to a home's socket (rundir.py) if it leads nowhere; only our own is followed."""
    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode) and status.st_uid == os.getuid():
        try:
            os.stat(name, dir_fd=parent)
        except FileNotFoundError:
            os.unlink(name, dir_fd=parent)


def _sweep_abandoned(parent: int, name: str, home: int, lease: int, everyone: bool) -> Steps:
    refusal = _refusal(home, everyone)
    if refusal is not None:
        return refusal
    status, uid = os.fstat(lease), os.fstat(home).st_uid
    # A user may be able to link to another user's file, and call it a lease.
    if status.st_uid != uid or status.st_nlink != 1:
        return _ANOTHERS
    if is_held(lease) or not is_entry(lease, home, LEASE):
        return BlockingIOError(errno.EAGAIN, "its owner is alive")
    try:
        data = os.open(DATA, DIRECTORY, dir_fd=home)
    except OSError:
        pass
    else:
        try:
            # Another user may have moved a server there that is not theirs.
            if uid in (os.getuid(), os.fstat(data).st_uid):
                clear(data)
        finally:
            os.close(data)
    if says_keep(lease):
        os.unlink(LEASE, dir_fd=home)
        return None
    return (yield from remove_open(parent, _set_aside(parent, name, home), home))


def _refusal(home: int, everyone: bool) -> OSError | None:
    """Why a home is not ours to sweep, if so."""
    status = os.fstat(home)
    if status.st_uid != os.getuid() and not everyone:
        return _ANOTHERS
    # A directory that others may write to is no run directory: anyone could put a lease into it.
    return _SHARED if status.st_mode & 0o022 else None


def _set_aside(parent: int, name: str, home: int) -> str:
    """Rename what is to be removed; the name that it has now.

    The lease goes with the first files. If this removal is cut short, the next sweep continues it.
    """
    aside = name.removesuffix(ASIDE) + ASIDE
    quietly(os.rename, name, aside, src_dir_fd=parent, dst_dir_fd=parent)
    return aside if is_entry(home, parent, aside) else name


def is_held(lease: int) -> bool:
    """Whether somebody else holds a lease; else this descriptor does from now on."""
    try:
        fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def says_keep(lease: int) -> bool:
    """Whether the data that a lease is of is to outlive its owner."""
    return os.pread(lease, len(KEEP), 0) == KEEP


def is_half_made(home: int, name: str) -> bool:
    """Whether a directory without a lease is one that nobody makes or removes any more.

    What was set aside never is kept. Other directories may have such a name (a kept home, the
    folder of failed tests, a cache), but there is something in them. Raises OSError.
    """
    if name.endswith(ASIDE):
        return True
    if time.time() - os.fstat(home).st_mtime <= HALF_MADE:
        return False
    with os.scandir(home) as entries:
        return all(entry.name == LEASE + NEW for entry in entries)


def _sweep_half_made(parent: int, name: str, home: int, everyone: bool) -> Steps:
    refusal = _refusal(home, everyone)
    if refusal is not None:
        return refusal
    if not is_half_made(home, name):
        return BlockingIOError(errno.EAGAIN, "it is being made")
    return (yield from remove_open(parent, name, home))
