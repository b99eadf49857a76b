"""A cluster's home: the directory that holds its data, its socket, its log and its lease.

pgtemp-3kq9w2ab/     0700, of the user PostgreSQL runs as
    lease            locked while the owner or its warden lives; says keep or discard, and who
                     the owner is: its pid and when it started
    data/            the data directory
    server.log
    shelf/           directories of dropped databases, to be used again (shelf.py)
    spare            room for when the disk is full (host/room.py); in servers for many databases
    .s.PGSQL.5432    the socket; where the path is too long, a short link leads to it
"""

from __future__ import annotations

import os
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pgtemp.errors import OptionError
from pgtemp.host import locks, paths, proc, room
from pgtemp.host.identity import Identity
from pgtemp.server.remains import DATA, DISCARD, KEEP, LEASE, PREFIX, SHELF, removal

LOG = "server.log"
_ALPHABET = string.ascii_lowercase + string.digits


@dataclass(frozen=True, slots=True)
class Home:
    """A directory made for one cluster.

    Attributes:
        path: the directory.
        socket_dir: it too, or a link to it with a short path.
        lease: the descriptor of its locked lease file.
    """

    path: Path
    socket_dir: Path
    lease: int

    def release(self) -> None:
        """Let go of the lease; from now on the home is the warden's, or the next sweep's."""
        os.close(self.lease)

    @property
    def data(self) -> Path:
        return self.path / DATA

    @property
    def log(self) -> Path:
        return self.path / LOG

    def leftovers(self, *, keep: bool) -> list[str]:
        """What is to be removed when the cluster ends."""
        if keep:
            sockets = [] if self.socket_dir == self.path else [str(self.socket_dir)]
            ours = [str(self.path / name) for name in (SHELF, room.ASIDE, LEASE)]
            return [*sockets, *ours]
        return [str(path) for path in sorted({self.path, self.socket_dir}, reverse=True)]


def find_base(prefix: str | os.PathLike[str] | None, owner: Identity, *, keep: bool) -> Path:
    """The directory in which a home would be made.

    Raises:
        OptionError: the directory asked for cannot be used, or `owner` cannot get there.
    """
    base = paths.scratch_base(prefix, keep=keep)
    blocked = owner.blocked_at(base)
    if blocked is not None:
        raise OptionError(
            f"user {owner.name}, as whom PostgreSQL runs, cannot enter {blocked}",
            remedy="name another data_dir_prefix, or another user with run_as",
        )
    return base


def make(prefix: str | os.PathLike[str] | None, owner: Identity, *, keep: bool) -> Home:
    """Make a home, empty but for its lease and an empty data directory.

    Raises:
        OptionError: the directory asked for cannot be used, or `owner` cannot get there.
        ClusterError: it cannot be written; a DiskFullError where there is no room.
    """
    base = find_base(prefix, owner, keep=keep)
    try:
        path = _private_dir(base)
        try:
            lease = _lease(path, keep=keep)
            try:
                os.mkdir(path / DATA, 0o700)
                owner.own(path / DATA)
                owner.own(path)
                return Home(path, _socket_dir(path, owner), lease)
            except BaseException:
                os.close(lease)
                raise
        except BaseException:
            discard([str(path)])
            raise
    except OSError as error:
        raise room.cannot_write(base, error) from error


def discard(leftovers: Sequence[str]) -> None:
    """Remove what is left of a home, at once."""
    for path in leftovers:
        for _ in removal(path):
            pass


def reopen(path: Path, owner: Identity) -> Home:
    """Take over a home that was kept.

    Raises:
        OptionError: somebody has it.
        ClusterError: it cannot be written.
    """
    if locks.is_locked(path / LEASE):
        raise OptionError(
            f"a server is running on {path}", remedy="end the pgtemp that holds it first"
        )
    try:
        lease = _lease(path, keep=True)
        try:
            return Home(path, _socket_dir(path, owner), lease)
        except BaseException:
            os.unlink(path / LEASE)
            os.close(lease)
            raise
    except OSError as error:
        raise room.cannot_write(path, error) from error


def _lease(path: Path, *, keep: bool) -> int:
    # For `pgtemp ls` alone: whether the owner lives is told by the lock.
    owner = f"{os.getpid()} {proc.started(os.getpid())}\n".encode()
    return locks.create_locked(path / LEASE, (KEEP if keep else DISCARD) + owner)


def _socket_dir(path: Path, owner: Identity) -> Path:
    if len(os.fsencode(path / ".s.PGSQL.65535")) <= paths.SOCKET_PATH_BYTES:
        return path
    while True:
        link = paths.socket_base(owner) / _name()
        try:
            link.symlink_to(path)
        except FileExistsError:
            continue
        return link


def _private_dir(base: Path) -> Path:
    while True:
        path = base / _name()
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            continue
        return path


def _name() -> str:
    return PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(8))
