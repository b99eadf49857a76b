"""What owners leave behind, and taking it away: homes, half-made ones, what was set aside.

Shared by the warden's process, so it imports nothing that is slow and nothing of pgtemp but
crash.py, whose distrust of paths it shares. Liveness is told by a lock, never by a name or an age.
"""

from __future__ import annotations

import fcntl
import os
import time

from pgtemp.host.tree import ASIDE, DIRECTORY, open_file, quietly, removal
from pgtemp.server.crash import clear

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

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


def sweep(base: str) -> Iterator[None]:
    """Take away what owners that are gone have left in `base`: processes, then directories."""
    try:
        names = [name for name in os.listdir(base) if name.startswith(PREFIX)]
    except OSError:
        return
    for name in names:
        yield
        yield from sweep_home(os.path.join(base, name))


def sweep_home(path: str, everyone: bool = False) -> Iterator[None]:
    """The same for one home. `everyone`: also what other users' owners have left."""
    if os.path.islink(path):  # a short way to a home's socket
        quietly(_drop_dead_link, path)
        return
    try:
        home = os.open(path, DIRECTORY)
    except OSError:
        return
    try:
        try:
            lease = open_file(LEASE, home)
        except FileNotFoundError:
            yield from _sweep_half_made(path)
            return
        try:
            yield from _sweep_abandoned(path, home, lease, everyone)
        finally:
            os.close(lease)
    except OSError:
        return  # somebody else's, or gone by now
    finally:
        os.close(home)


def _drop_dead_link(path: str) -> None:
    if not os.path.exists(path) and os.lstat(path).st_uid == os.getuid():
        os.unlink(path)


def _sweep_abandoned(path: str, home: int, lease: int, everyone: bool) -> Iterator[None]:
    if os.fstat(lease).st_uid != os.getuid() and not everyone:
        return
    if is_held(lease):
        return  # its owner lives
    try:
        data = os.open(DATA, DIRECTORY, dir_fd=home)
    except OSError:
        pass
    else:
        try:
            clear(data)
        finally:
            os.close(data)
    if says_keep(lease):
        os.unlink(LEASE, dir_fd=home)
    elif os.path.samestat(os.fstat(home), os.lstat(path)):
        yield from removal(path)


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


def is_half_made(home: str) -> bool:
    """Whether a directory without a lease is one that nobody makes or removes any more.

    What was set aside never is kept. Other directories may have such a name (a kept home, the
    folder of failed tests, a cache), but there is something in them.
    """
    try:
        old = time.time() - os.lstat(home).st_mtime > HALF_MADE
        return home.endswith(ASIDE) or (old and set(os.listdir(home)) <= {LEASE + NEW})
    except OSError:
        return False


def _sweep_half_made(home: str) -> Iterator[None]:
    uid = os.lstat(home).st_uid
    # What was set aside is the server's user's, where root runs it.
    mine = uid == os.getuid() or (os.getuid() == 0 and home.endswith(ASIDE))
    if mine and is_half_made(home):
        yield from removal(home)
