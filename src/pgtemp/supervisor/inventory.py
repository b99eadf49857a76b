"""The homes that there are on this machine, whoever made them: for `pgtemp ls` and `pgtemp sweep`.

Looked for in the usual places, and in the working directories of all PostgreSQL processes, so that
a running server is found wherever its home is.

Any local user can make a directory with such a name, and root looks into it. So all is read through
descriptors, no link is followed, and no file system that is mounted in a home is entered.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pgtemp.host import disk_space, paths, procfs
from pgtemp.host.openat import DIRECTORY, open_file, open_passage
from pgtemp.supervisor.crash import all_postgres
from pgtemp.supervisor.leftovers import (
    DATA,
    LEASE,
    PREFIX,
    is_half_made,
    is_held,
    says_keep,
    sweep_home,
)

_FIRST_OF_USERS = 16384  # oids below are of the databases that initdb makes
_IN_EACH = "pg_filenode.map"
# The system refuses these removals every time: immutable, mounted, read-only, another user's.
_REFUSED = (errno.EPERM, errno.EACCES, errno.EBUSY, errno.EROFS, errno.EAGAIN)


@dataclass(frozen=True, slots=True)
class Swept:
    """What became of a home in a sweep.

    Attributes:
        reason: why it is still there; None where it is removed, or its data is kept.
        failed: whether it should have been removed. Otherwise it is left alone on purpose, and the
            next sweep will leave it alone too.
    """

    reason: str | None = None
    failed: bool = False

    @property
    def removed(self) -> bool:
        return self.reason is None


@dataclass(frozen=True, slots=True)
class Found:
    """A home.

    Attributes:
        uid: whose directory it is.
        open: whether we may look into it.
        lives: whether somebody holds its lease.
        keep: whether its data is to outlive its owner.
        owner: the process that made it; None where that is gone, or cannot be told.
        processes: of the server in it.
    """

    path: Path
    uid: int
    open: bool
    lives: bool
    keep: bool
    owner: int | None
    processes: tuple[int, ...]

    @property
    def is_ours(self) -> bool:
        """Whether it is for us to take away what is left of it."""
        return os.geteuid() in (0, self.uid)

    @property
    def databases(self) -> int:
        """How many databases were made in the server, those that are kept ready too."""
        try:
            with (
                opened(self.path) as home,
                _below(DATA, home) as data,
                _below("base", data) as base,
            ):
                made = [name for name in os.listdir(base) if name.isdecimal()]
                return sum(int(name) >= _FIRST_OF_USERS and _is_whole(base, name) for name in made)
        except OSError:
            return 0

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        try:
            with opened(self.path) as home:
                return disk_space.size_of(home)
        except OSError:
            return 0

    def sweep(self) -> Swept:
        """Take away what its owner has left.

        Root takes away what is anybody's. Where the owner lives after all, nothing happens.
        """
        try:
            parent = open_passage(os.fspath(self.path.parent))
        except OSError as error:
            return self._after(error)
        try:
            work = sweep_home(parent, self.path.name, everyone=os.geteuid() == 0)
            while True:
                next(work)  # step by step, for whoever has something else to do
        except StopIteration as done:
            return self._after(done.value)
        finally:
            os.close(parent)

    def _after(self, error: OSError | None) -> Swept:
        if error is None:
            return Swept()
        mine = self.uid == os.geteuid()
        return Swept(error.strerror or str(error), mine and error.errno not in _REFUSED)


@contextmanager
def opened(home: Path) -> Iterator[int]:
    """A descriptor of a home for a block; no part of its path may be a link. Raises OSError."""
    parent = open_passage(os.fspath(home.parent))
    try:
        directory = os.open(home.name, DIRECTORY, dir_fd=parent)
    finally:
        os.close(parent)
    try:
        yield directory
    finally:
        os.close(directory)


@contextmanager
def _below(name: str, directory: int) -> Iterator[int]:
    below = os.open(name, DIRECTORY, dir_fd=directory)
    try:
        yield below
    finally:
        os.close(below)


def _is_whole(base: int, name: str) -> bool:
    """Whether a database has files; one without is none (see recycle.py)."""
    try:
        with _below(name, base) as database:
            os.stat(_IN_EACH, dir_fd=database, follow_symlinks=False)
    except OSError:
        return False
    return True


def homes(also: Iterable[Path] = ()) -> list[Found]:
    """Every home that is somebody's or was left behind; not those that were kept on purpose.

    Args:
        also: further directories in which homes were made (data_dir_prefix).
    """
    running: dict[Path, list[int]] = {}
    for pid, cwd in all_postgres():
        if Path(cwd).parent.name.startswith(PREFIX):
            running.setdefault(Path(cwd).parent, []).append(pid)
    bases = {base.resolve() for base in [*paths.sweep_bases(), *also]}
    seen = {home for base in bases for home in base.glob(f"{PREFIX}*")} | running.keys()
    found = (_look(home, tuple(running.get(home, ()))) for home in sorted(seen))
    return [one for one in found if one is not None]


def _look(home: Path, running: tuple[int, ...]) -> Found | None:
    try:
        uid = home.lstat().st_uid
    except OSError:  # gone by now, or out of our sight
        return None
    closed = Found(home, uid, False, True, False, None, running)
    try:
        with opened(home) as here:
            return _look_into(home, here, running)
    except PermissionError:
        return closed
    except OSError:  # a short way to the socket of one
        return None


def _look_into(home: Path, here: int, running: tuple[int, ...]) -> Found | None:
    uid = os.fstat(here).st_uid
    try:
        lease = open_file(LEASE, here)
    except PermissionError:
        raise
    except OSError:
        # What is being made or removed right now, or was kept, has none.
        left = is_half_made(here, home.name)
        return Found(home, uid, True, False, False, None, running) if left else None
    try:
        lives = is_held(lease)
        owner = _owner(lease) if lives else None
        return Found(home, uid, True, lives, says_keep(lease), owner, running)
    finally:
        os.close(lease)


def _owner(lease: int) -> int | None:
    """The process that a lease names, if it is still that one, and its user's."""
    try:
        pid, started = (int(word) for word in os.pread(lease, 64, 0).split(b"\n")[1].split())
        same_user = os.stat(f"/proc/{pid}").st_uid == os.fstat(lease).st_uid
    except (IndexError, ValueError, OSError):
        return None
    return pid if same_user and procfs.started(pid) == started else None
