"""The run directory of one server: its data, its socket, its log and its lease.

pgtemp-3kq9w2ab/        the owner's, 0700; 0750 if the server runs as another user, of that group
    lease               locked while the owner or its warden lives; says keep or discard, and who
                        the owner is: its pid and when it started
    server.log
    spare               space for when the disk is full (host/disk_space.py)
    data/               the data directory, of the server's user
    shelf/              of the server's user: directories of dropped databases, to be recycled
    socket/             of the server's user, 0700
        .s.PGSQL.5432   the socket; if its path is too long, a short link leads to its directory
    .s.PGSQL.5432       a link to it, for programs that look beside the data directory

The server's user may change what is in its three directories, and can replace none of them. So the
owner may use paths of the other files; below the three it goes by descriptors (host/tree.py).
"""

from __future__ import annotations

import os
import secrets
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pgtemp.errors import OptionError
from pgtemp.host import disk_space, locks, paths, procfs
from pgtemp.host.identity import Identity
from pgtemp.host.removal import remove
from pgtemp.host.tree import Tree
from pgtemp.supervisor.leftovers import DATA, DISCARD, KEEP, LEASE, PREFIX, SHELF, SOCKET

LOG = "server.log"
_PASSED = 0o750  # the group of the server's user may enter
_SOCKET_NAME = ".s.PGSQL."
_ALPHABET = string.ascii_lowercase + string.digits


@dataclass(frozen=True, slots=True)
class Home:
    """A directory made for one server.

    Attributes:
        path: the directory.
        socket_dir: the directory of the socket, or a link to it with a short path.
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

    def link_socket(self, port: int) -> None:
        """Make the link to the socket in the run directory itself. Raises OSError."""
        with Tree.open(self.path) as tree:
            for name in self._sockets():
                tree.remove(name)
            tree.link(f"{_SOCKET_NAME}{port}", f"{SOCKET}/{_SOCKET_NAME}{port}")

    def _sockets(self) -> list[str]:
        try:
            return [name for name in os.listdir(self.path) if name.startswith(_SOCKET_NAME)]
        except FileNotFoundError:
            return []

    @property
    def log(self) -> Path:
        return self.path / LOG

    def leftovers(self, *, keep: bool) -> list[str]:
        """What is to be removed when the cluster ends."""
        links = [] if self.socket_dir == self.path / SOCKET else [str(self.socket_dir)]
        if keep:
            names = (*self._sockets(), SOCKET, SHELF, disk_space.ASIDE, LEASE)
            return [*links, *(str(self.path / name) for name in names)]
        return [*links, str(self.path)]


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
    """Make a home, empty but for its lease and directories.

    The data directory is still the caller's, to be handed over when it is complete.

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
                with Tree.open(path) as home, _theirs(home, owner) as theirs:
                    theirs.make_directory(DATA)
                    return _opened(theirs, owner, lease)
            except BaseException:
                os.close(lease)
                raise
        except BaseException:
            discard([str(path)])
            raise
    except OSError as error:
        raise disk_space.cannot_write(base, error) from error


def _theirs(home: Tree, owner: Identity) -> Tree:
    """The tree of a home for making directories in it that a server's user gets."""
    fd = os.dup(home.fd)
    if not owner.switch:
        return Tree(fd, home.path, None)
    return Tree(fd, home.path, owner.uid, owner.gid)


def _opened(home: Tree, owner: Identity, lease: int) -> Home:
    """Make the directories that a server needs beside its data, and let its user pass."""
    for name in (SOCKET, SHELF):
        home.make_directory(name)
        home.hand_over(name)
    _let_pass(home, owner)
    path = Path(home.path)
    return Home(path, _socket_dir(path / SOCKET, owner), lease)


def new_data(home: Home, owner: Identity) -> Tree:
    """The empty data directory of a new home, to be filled and handed over to its user."""
    with Tree.open(home.path) as tree, _theirs(tree, owner) as theirs:
        return theirs.below(DATA)


def _let_pass(home: Tree, owner: Identity) -> None:
    if owner.switch:
        os.fchown(home.fd, -1, owner.gid)
        os.fchmod(home.fd, _PASSED)


@contextmanager
def stored(path: Path, owner: Identity) -> Iterator[tuple[Tree, Tree]]:
    """A new home for data that is kept: itself and its empty data directory.

    It gets its name when the block has filled it.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    with Tree.open(path.parent) as above:
        fresh = f".{path.name}.{os.getpid()}"
        try:
            above.make_directory(fresh)
            with above.below(fresh) as home, _theirs(home, owner) as theirs:
                theirs.make_directory(DATA)
                with theirs.below(DATA) as data:
                    yield home, data
                _let_pass(home, owner)
            above.rename(fresh, path.name)
        except BaseException:
            above.remove(fresh)
            raise


def kept_at(path: Path) -> Path:
    """The home in which data was kept, of which the home or the data directory was named.

    Raises:
        OptionError: no data was kept there, or it cannot be read.
    """
    path = path.absolute()
    reason = "holds no data that pgtemp kept"
    for home in (path, path.parent) if path.name == DATA else (path,):
        try:
            with Tree.reach(home / DATA) as data:
                if data.status("PG_VERSION") is not None:
                    return home
        except FileNotFoundError:
            continue
        except OSError as error:
            reason = f"cannot be opened: {error.strerror}"
    raise OptionError(f"{path} {reason}", remedy="name a directory that --persist printed")


def discard(leftovers: Sequence[str]) -> None:
    """Remove what is left of a home, at once."""
    for path in leftovers:
        remove(path)


def reopen(path: Path, owner: Identity) -> Home:
    """Take over a home that was kept, which is the caller's.

    Raises:
        OptionError: it is in use, or another user's.
        ClusterError: it cannot be written.
    """
    try:
        with Tree.reach(path) as home, _theirs(home, owner) as theirs:
            if os.fstat(home.fd).st_uid != os.geteuid():
                raise OptionError(
                    f"{path} belongs to another user", remedy="open it as the user it belongs to"
                )
            if locks.is_locked(path / LEASE):
                raise OptionError(
                    f"a server is running on {path}", remedy="end the pgtemp that holds it first"
                )
            lease = _lease(path, keep=True)
            try:
                for name in (SOCKET, SHELF):
                    home.remove(name)
                return _opened(theirs, owner, lease)
            except BaseException:
                os.unlink(path / LEASE)
                os.close(lease)
                raise
    except OSError as error:
        raise disk_space.cannot_write(path, error) from error


def _lease(path: Path, *, keep: bool) -> int:
    # For `pgtemp ls` alone: whether the owner lives is told by the lock.
    owner = f"{os.getpid()} {procfs.started(os.getpid())}\n".encode()
    return locks.create_locked(path / LEASE, (KEEP if keep else DISCARD) + owner)


def _socket_dir(path: Path, owner: Identity) -> Path:
    """The directory of the socket, or a link to it if its path is too long for a socket's."""
    if len(os.fsencode(path / f"{_SOCKET_NAME}65535")) <= paths.SOCKET_PATH_BYTES:
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
