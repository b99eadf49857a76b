"""The run directories of all users on this machine: for `pgtemp ls` and `pgtemp sweep`.

The search covers the usual directories and the working directories of all PostgreSQL processes, so
that it finds every running server, wherever its run directory is.

Any local user can create a directory with such a name, and root inspects it. The content is
therefore read through descriptors, without following links or entering mounted file systems.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pgtemp.host import disk_space, paths, procfs
from pgtemp.host.openat import DIRECTORY, Closing, open_file, open_passage
from pgtemp.supervisor.crash import all_postgres
from pgtemp.supervisor.leftovers import (
    DATA,
    LEASE,
    PREFIX,
    is_held,
    is_persisted,
    is_unfinished,
    sweep_directory,
)

_FIRST_OF_USERS = 16384  # FirstNormalObjectId: initdb's databases have smaller oids
_IN_EACH = "pg_filenode.map"  # a file that exists in every database
# Errors of removals that will always fail: the path is immutable, mounted, read-only or another
# user's.
_REFUSED = (errno.EPERM, errno.EACCES, errno.EBUSY, errno.EROFS, errno.EAGAIN)


@dataclass(frozen=True, slots=True)
class Swept:
    """The result of a sweep for one run directory.

    Attributes:
        reason: why the directory still exists; None if it was removed, or if its data is persisted.
        failed: whether its removal failed. Otherwise it was intentionally not removed, and the next
            sweep will not remove it either.
    """

    reason: str | None = None
    failed: bool = False

    @property
    def removed(self) -> bool:
        return self.reason is None


@dataclass(frozen=True, slots=True)
class Found:
    """A run directory.

    Attributes:
        uid: the user that owns the directory.
        processes: the pids of the server in it.
        open: whether this process may read it.
        lives: whether its owner or its supervisor holds the lock of its lease file.
        keep: whether its data remains when its owner exits.
        owner: the pid of its owner; None if the owner has exited or is unknown.
    """

    path: Path
    uid: int
    processes: tuple[int, ...]
    open: bool = True
    lives: bool = False
    keep: bool = False
    owner: int | None = None

    @property
    def is_ours(self) -> bool:
        """Whether this user may remove it."""
        return os.geteuid() in (0, self.uid)

    @property
    def databases(self) -> int:
        """The number of databases created in the server, including the ready ones in the pool."""
        try:
            with (
                opened(self.path) as run_dir,
                _below(DATA, run_dir) as data,
                _below("base", data) as base,
            ):
                oids = [name for name in os.listdir(base) if name.isdecimal()]
                return sum(int(oid) >= _FIRST_OF_USERS and _is_whole(base, oid) for oid in oids)
        except OSError:
            return 0

    @property
    def size(self) -> int:
        """Its size on disk in bytes."""
        try:
            with opened(self.path) as run_dir:
                return disk_space.size_of(run_dir)
        except OSError:
            return 0

    def sweep(self) -> Swept:
        """Remove it and its remaining processes, unless its owner is still running.

        Root also removes run directories of other users.
        """
        try:
            parent = open_passage(os.fspath(self.path.parent))
        except OSError as error:
            return self._after(error)
        with Closing(parent):
            work = sweep_directory(parent, self.path.name, everyone=os.geteuid() == 0)
            while True:  # the steps are for the supervisor, which serves requests in between
                try:
                    next(work)
                except StopIteration as done:
                    return self._after(done.value)

    def _after(self, error: OSError | None) -> Swept:
        if error is None:
            return Swept()
        mine = self.uid == os.geteuid()
        return Swept(error.strerror or str(error), mine and error.errno not in _REFUSED)


def opened(run_dir: Path) -> Closing:
    """Open a run directory for a block; no part of its path may be a link. Raises OSError."""
    with Closing(open_passage(os.fspath(run_dir.parent))) as parent:
        return _below(run_dir.name, parent)


def _below(name: str, directory: int) -> Closing:
    return Closing(os.open(name, DIRECTORY, dir_fd=directory))


def _is_whole(base: int, name: str) -> bool:
    """Whether a database has its files; a directory without them is not a database (recycle.py)."""
    try:
        with _below(name, base) as database:
            os.stat(_IN_EACH, dir_fd=database, follow_symlinks=False)
    except OSError:
        return False
    return True


def run_directories(additional: Iterable[Path] = ()) -> list[Found]:
    """All run directories that are in use or were left behind, except persisted data.

    Args:
        additional: further directories that contain run directories (data_dir_prefix).
    """
    running: dict[Path, list[int]] = {}
    for pid, cwd in all_postgres():
        if Path(cwd).parent.name.startswith(PREFIX):
            running.setdefault(Path(cwd).parent, []).append(pid)
    bases = {base.resolve() for base in [*paths.sweep_bases(), *additional]}
    seen = {run_dir for base in bases for run_dir in base.glob(f"{PREFIX}*")} | running.keys()
    found = (_look(run_dir, tuple(running.get(run_dir, ()))) for run_dir in sorted(seen))
    return [one for one in found if one is not None]


def _look(run_dir: Path, running: tuple[int, ...]) -> Found | None:
    try:
        uid = run_dir.lstat().st_uid
    except OSError:  # removed in the meantime, or not visible to this user
        return None
    try:
        with opened(run_dir) as here:
            return _look_into(run_dir, here, running)
    except PermissionError:
        return Found(run_dir, uid, running, open=False, lives=True)
    except OSError:  # a short link to the socket of a run directory
        return None


def _look_into(run_dir: Path, here: int, running: tuple[int, ...]) -> Found | None:
    uid = os.fstat(here).st_uid
    try:
        lease = open_file(LEASE, here)
    except PermissionError:
        raise
    except OSError:
        # A directory that is being created or removed, or is persisted, has no lease file.
        return Found(run_dir, uid, running) if is_unfinished(here, run_dir.name) else None
    with Closing(lease):
        lives = is_held(lease)
        owner = _owner(lease) if lives else None
        return Found(run_dir, uid, running, lives=lives, keep=is_persisted(lease), owner=owner)


def _owner(lease: int) -> int | None:
    """The pid in a lease file, if it still denotes the same process of the same user."""
    try:
        pid, started = (int(word) for word in os.pread(lease, 64, 0).split(b"\n")[1].split())
        same_user = os.stat(f"/proc/{pid}").st_uid == os.fstat(lease).st_uid
    except (IndexError, ValueError, OSError):
        return None
    return pid if same_user and procfs.started(pid) == started else None
