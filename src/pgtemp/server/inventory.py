"""The homes that there are on this machine, whoever made them: for `pgtemp ls` and `pgtemp sweep`.

Looked for in the usual places, and in the working directories of all PostgreSQL processes, so that
a running server is found wherever its home is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pgtemp.host import locks, paths, proc, room
from pgtemp.server.remains import (
    DATA,
    KEEP,
    LEASE,
    PREFIX,
    all_postgres,
    is_half_made,
    sweep_home,
)  # fmt: skip

_FIRST_OF_USERS = 16384  # oids below are of the databases that initdb makes


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
    def databases(self) -> int:
        """How many databases were made in the server, those that are kept ready too."""
        try:
            names = os.listdir(self.path / DATA / "base")
        except OSError:
            return 0
        return sum(name.isdigit() and int(name) >= _FIRST_OF_USERS for name in names)

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return room.size_of(self.path)

    def sweep(self) -> bool:
        """Take away what its owner has left; whether it is gone, or no longer waits for that.

        Root takes away what is anybody's. Where the owner lives after all, nothing happens.
        """
        for _ in sweep_home(str(self.path), everyone=os.geteuid() == 0):
            pass  # step by step, for whoever has something else to do
        return not self.path.exists() or (self.keep and not (self.path / LEASE).exists())


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
        status = home.lstat()
    except OSError:  # gone by now
        return None
    if not stat.S_ISDIR(status.st_mode):  # a short way to the socket of one
        return None
    try:
        said = (home / LEASE).read_bytes()
        lives = locks.is_locked(home / LEASE)
    except PermissionError:
        return Found(home, status.st_uid, False, True, False, None, running)
    except OSError:
        # What is being made or removed right now, or was kept, has none.
        left = is_half_made(str(home))
        return Found(home, status.st_uid, True, False, False, None, running) if left else None
    owner = _owner(said) if lives else None
    return Found(home, status.st_uid, True, lives, said.startswith(KEEP), owner, running)


def _owner(lease: bytes) -> int | None:
    """The process that a lease names, if it is still that one."""
    try:
        pid, started = (int(word) for word in lease.split(b"\n")[1].split())
    except (IndexError, ValueError):
        return None
    return pid if proc.started(pid) == started and proc.lives(pid) else None
