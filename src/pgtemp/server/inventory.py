"""The homes that there are on this machine, whoever made them: for `pgtemp ls` and `pgtemp sweep`.

Looked for in the usual places, and in the working directories of all PostgreSQL processes, so that
a running server is found wherever its home is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pgtemp.host import paths, proc, room
from pgtemp.host.tree import DIRECTORY, open_file
from pgtemp.server.crash import all_postgres
from pgtemp.server.remains import (
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
        base = self.path / DATA / "base"
        try:
            made = [name for name in os.listdir(base) if name.isdigit()]
            # One without files is no database (see reuse.py).
            return sum(
                int(name) >= _FIRST_OF_USERS and (base / name / _IN_EACH).exists() for name in made
            )
        except OSError:
            return 0

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
        uid = home.lstat().st_uid
    except OSError:  # gone by now, or out of our sight
        return None
    try:
        here = os.open(home, DIRECTORY)
    except PermissionError:
        return Found(home, uid, False, True, False, None, running)
    except OSError:  # a short way to the socket of one
        return None
    try:
        lease = open_file(LEASE, here)
    except PermissionError:
        return Found(home, uid, False, True, False, None, running)
    except OSError:
        # What is being made or removed right now, or was kept, has none.
        left = is_half_made(str(home))
        return Found(home, uid, True, False, False, None, running) if left else None
    finally:
        os.close(here)
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
    return pid if same_user and proc.started(pid) == started else None
