"""The run directory of one server: its data, its socket, its log and its lease.

pgtemp-3kq9w2ab/        of the owner, 0700; if the server user is another user: 0750, of its group
    lease               locked while the owner or its supervisor runs; contains "keep" or
                        "discard", and the owner's pid and start time
    server.log
    spare               reserved space, released if the disk is full (host/disk_space.py)
    data/               the data directory, of the server user
    recycled/           of the server user: directories of dropped databases, to be recycled
    socket/             of the server user, 0700
        .s.PGSQL.5432   the socket; if its path is too long, a short link leads to its directory
    .s.PGSQL.5432       a link to it, for programs that look next to the data directory

The server user can change the contents of its three directories, but cannot replace them. The owner
therefore uses paths for the other files, and descriptors below the three (host/tree.py).
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pgtemp.errors import OptionError
from pgtemp.host import disk_space, locks, paths, procfs, user_paths
from pgtemp.host.identity import Identity
from pgtemp.host.removal import remove
from pgtemp.host.tree import Tree
from pgtemp.supervisor.leftovers import DATA, DISCARD, KEEP, LEASE, PREFIX, RECYCLED, SOCKET

LOG = "server.log"
_GROUP_MAY_ENTER = 0o750  # the group of the server user may enter
_SOCKET_NAME = ".s.PGSQL."


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The run directory of one server.

    Attributes:
        path: the directory.
        socket_dir: the directory of the socket, or a link to it with a short path.
        lease: the descriptor of its locked lease file.
    """

    path: Path
    socket_dir: Path
    lease: int

    def release(self) -> None:
        """Close the lease file; the supervisor, or the next sweep, then removes the directory."""
        os.close(self.lease)

    @property
    def data(self) -> Path:
        return self.path / DATA

    def protect_socket(self) -> None:
        """Make the caller own the socket's directory, once the server listens. Raises OSError.

        The server user can then no longer replace the socket by another one, or by a link.
        PostgreSQL only needs to reach its socket; it ignores the error when it cannot remove it.
        """
        with Tree.open(self.path) as tree:
            tree.take_back(SOCKET, _GROUP_MAY_ENTER)

    def link_socket(self, port: int) -> None:
        """Create the link to the socket in the run directory itself. Raises OSError."""
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
        """The paths to remove when the server has stopped."""
        links = [] if self.socket_dir == self.path / SOCKET else [str(self.socket_dir)]
        if keep:
            names = (*self._sockets(), SOCKET, RECYCLED, disk_space.RESERVE, LEASE)
            return [*links, *(str(self.path / name) for name in names)]
        return [*links, str(self.path)]


def find_base(prefix: str | os.PathLike[str] | None, owner: Identity, *, keep: bool) -> Path:
    """The directory in which a run directory would be created.

    Raises OptionError if the requested directory cannot be used, or `owner` cannot enter it.
    """
    base = paths.scratch_base(prefix, keep=keep)
    blocked = owner.blocked_at(base)
    if blocked is not None:
        raise OptionError(
            f"user {owner.name}, which PostgreSQL runs as, cannot enter {blocked}",
            remedy="specify another data_dir_prefix, or another user with run_as",
        )
    return base


def make(prefix: str | os.PathLike[str] | None, owner: Identity, *, keep: bool) -> RunDirectory:
    """Create a run directory with its lease file and its directories, which are empty.

    The data directory belongs to the caller until it is complete and handed over. Raises
    OptionError if the requested directory cannot be used, or `owner` cannot enter it, and
    ClusterError if the directory is not writable; a DiskFullError if the disk is full.
    """
    base = find_base(prefix, owner, keep=keep)
    with disk_space.writing(base), ExitStack() as failed:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        failed.callback(discard, [str(path)])
        lease = _lease(path, keep=keep)
        failed.callback(os.close, lease)
        with Tree.open(path) as run_dir, _for_user(run_dir, owner) as tree:
            tree.make_directory(DATA)
            made = _prepared(tree, owner, lease)
        failed.pop_all()
        return made


def _for_user(run_dir: Tree, owner: Identity) -> Tree:
    """The tree of a run directory, in which new directories are created for the server user."""
    fd = os.dup(run_dir.fd)
    if not owner.switch:
        return Tree(fd, run_dir.path, None)
    return Tree(fd, run_dir.path, owner.uid, owner.gid)


def _prepared(tree: Tree, owner: Identity, lease: int) -> RunDirectory:
    """Create the other directories of a server, and let its user enter the run directory."""
    for name in (SOCKET, RECYCLED):
        tree.make_directory(name)
        tree.hand_over(name)
    _let_group_enter(tree, owner)
    path = Path(tree.path)
    return RunDirectory(path, _socket_dir(path / SOCKET, owner), lease)


def new_data(run_dir: RunDirectory, owner: Identity) -> Tree:
    """The empty data directory of a new run directory, to be filled and handed over to its user."""
    with Tree.open(run_dir.path) as ours, _for_user(ours, owner) as tree:
        return tree.below(DATA)


def _let_group_enter(run_dir: Tree, owner: Identity) -> None:
    if owner.switch:
        os.fchown(run_dir.fd, -1, owner.gid)
        os.fchmod(run_dir.fd, _GROUP_MAY_ENTER)


@contextmanager
def stored(path: Path, owner: Identity) -> Iterator[tuple[Tree, Tree]]:
    """Create a run directory for data to persist; yield it and its empty data directory.

    It gets its final name at the end of the block, which fills it. If writing fails, it raises
    OSError and removes the directory.
    """
    with user_paths.open_tree(path.parent) as above:
        fresh = f".{path.name}.{os.getpid()}"
        try:
            above.make_directory(fresh)
            with above.below(fresh) as run_dir, _for_user(run_dir, owner) as tree:
                tree.make_directory(DATA)
                with tree.below(DATA) as data:
                    yield run_dir, data
                _let_group_enter(run_dir, owner)
            above.rename(fresh, path.name)
        except BaseException:
            above.remove(fresh)
            raise


def kept_at(path: Path) -> Path:
    """The run directory of persisted data, from its path or from that of its data directory.

    Raises OptionError if there is no persisted data, or it cannot be read.
    """
    path = path.absolute()
    reason = "contains no data that pgtemp persisted"
    for run_dir in (path, path.parent) if path.name == DATA else (path,):
        try:
            with user_paths.open_tree(run_dir / DATA) as data:
                # Without links, so that the path leads to the same directory from now on.
                above, name = os.path.split(data.path)
                if name == DATA and data.status("PG_VERSION") is not None:
                    return Path(above)
        except FileNotFoundError:
            continue
        except OSError as error:
            reason = f"cannot be opened: {error.strerror}"
    raise OptionError(f"{path} {reason}", remedy="specify a directory that --persist printed")


def discard(leftovers: Sequence[str]) -> None:
    """Remove the remaining paths of a run directory immediately."""
    for path in leftovers:
        remove(path)


def reopen(path: Path, owner: Identity) -> RunDirectory:
    """Acquire a run directory with persisted data, which must belong to the caller.

    Raises OptionError if it is in use, or belongs to another user, and ClusterError if it is not
    writable.
    """
    with (
        disk_space.writing(path),
        user_paths.open_tree(path) as run_dir,
        _for_user(run_dir, owner) as tree,
        ExitStack() as failed,
    ):
        if os.fstat(run_dir.fd).st_uid != os.geteuid():
            raise OptionError(
                f"{path} belongs to another user", remedy="open it as the user it belongs to"
            )
        if locks.is_locked(path / LEASE):
            raise OptionError(
                f"a server is running on {path}",
                remedy="first stop the pgtemp process that uses it",
            )
        lease = _lease(path, keep=True)
        failed.callback(os.close, lease)
        failed.callback(lambda: os.unlink(path / LEASE))
        for name in (SOCKET, RECYCLED):
            run_dir.remove(name)
        opened = _prepared(tree, owner, lease)
        failed.pop_all()
        return opened


def _lease(path: Path, *, keep: bool) -> int:
    # The owner is recorded only for `pgtemp ls`; the lock decides whether the owner is running.
    owner = f"{os.getpid()} {procfs.started(os.getpid())}\n".encode()
    return locks.create_locked(path / LEASE, (KEEP if keep else DISCARD) + owner)


def _socket_dir(path: Path, owner: Identity) -> Path:
    """The directory of the socket, or a link to it if its path is too long for a unix socket."""
    if len(os.fsencode(path / f"{_SOCKET_NAME}65535")) <= paths.SOCKET_PATH_BYTES:
        return path
    link = paths.socket_base(owner) / f"{PREFIX}{secrets.token_hex(8)}"
    link.symlink_to(path)
    return link
