"""Access to directory trees that another user may change, through descriptors only.

The owner of a server may be root. PostgreSQL then runs as another user, and a client can run
programs as that user. In a directory of that user, a path that was checked can lead to any other
file a moment later. This module is therefore the only one that accesses files below a data
directory (enforced by `tests/test_architecture.py`). Every step leads from an open directory to one
name in it, and never follows a link. A file is opened without blocking, and is used only if the
open descriptor refers to a regular file of the expected user. A new file is created exclusively.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from pgtemp.host.openat import DIRECTORY, READ, Closing, quietly
from pgtemp.host.removal import removal_at

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# PostgreSQL itself creates these links: initdb --waldir, CREATE TABLESPACE.
_OF_POSTGRES = ("pg_wal", "pg_tblspc/")
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}


class ForeignFileError(OSError):
    """A file or directory has an unexpected type, or belongs to an unexpected user."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(errno.EPERM, reason, name)


class Tree:
    """An open directory and everything below it.

    Args:
        fd: the directory's descriptor; `close` closes it.
        path: its path, used only in messages and for programs that run as the directory's user.
        uid: the user to whom every entry must belong; None if that does not matter because the
            caller has no more rights than that user.
        gid: new files get this group and the user `uid`; None if they keep the caller's ids.
    """

    __slots__ = ("_held", "fd", "gid", "path", "uid")

    def __init__(self, fd: int, path: str, uid: int | None, gid: int | None = None) -> None:
        self.fd, self.path, self.uid, self.gid = fd, path, uid, gid
        self._held: dict[str, int] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Tree:
        """Open the tree at a path whose parent directory is trusted.

        If the caller is root, every entry must belong to the user of the directory itself. Raises
        OSError if the path is missing, a link, or not a directory.
        """
        fd = os.open(path, DIRECTORY)
        uid = os.fstat(fd).st_uid if os.geteuid() == 0 else None
        return cls(fd, os.fspath(path), uid)

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the tree; does nothing if it is closed already."""
        while self._held:
            os.close(self._held.popitem()[1])
        fd, self.fd = self.fd, -1  # the number may soon denote another file
        if fd >= 0:
            os.close(fd)

    def hold(self, *names: str) -> None:
        """Keep directories open, so that later steps use them even if they are renamed.

        Raises the errors of `enter`."""
        for name in names:
            self._held[name] = self.enter(name)

    @property
    def is_foreign(self) -> bool:
        """Whether the caller is root and the tree belongs to another user."""
        return self.uid is not None and self.uid != os.geteuid()

    def enter(self, name: str) -> int:
        """Open a directory in the tree, or the tree itself for "", and return a new descriptor.

        Raises OSError if the directory is missing, is a link, or belongs to another user.
        """
        held = self._held.get(name)
        if held is not None or not name:
            return os.dup(self.fd if held is None else held)
        flags = DIRECTORY
        if name.startswith(_OF_POSTGRES) and not self.is_foreign:
            flags &= ~os.O_NOFOLLOW
        with self._parent(name) as (there, last):
            return self._checked(os.open(last, flags, dir_fd=there), name, directory=True)

    @contextmanager
    def _parent(self, name: str) -> Iterator[tuple[int, str]]:
        """Open the directory that contains the last part of a name, for the duration of a block."""
        above, _, last = name.rpartition("/")
        with Closing(self.enter(above)) as there:
            yield there, last

    def _checked(self, fd: int, name: str, *, directory: bool = False) -> int:
        status = os.fstat(fd)
        reason = ""
        if directory and self.gid is not None and status.st_uid == os.geteuid():
            return fd  # created by this tree, and not handed over yet
        if not directory and not stat.S_ISREG(status.st_mode):
            reason = f"is {kind_of(status.st_mode)}, not a regular file"
        elif self.uid is not None and status.st_uid != self.uid:
            reason = f"belongs to uid {status.st_uid}, not to uid {self.uid}"
        if reason:
            os.close(fd)
            raise ForeignFileError(f"{self.path}/{name}", reason)
        return fd

    def below(self, name: str) -> Tree:
        """Open a directory in the tree as a tree. Raises the errors of `enter`."""
        return Tree(self.enter(name), f"{self.path}/{name}", self.uid, self.gid)

    def make_directory(self, name: str, mode: int = 0o700) -> None:
        """Create a directory; it belongs to the caller until `hand_over`. Raises OSError."""
        with self._parent(name) as (there, last):
            os.mkdir(last, mode, dir_fd=there)
            with Closing(os.open(last, DIRECTORY, dir_fd=there)) as fd:
                os.fchmod(fd, mode)  # independent of the umask

    def link(self, name: str, target: str) -> None:
        """Create a symbolic link in the top directory. Raises OSError."""
        os.symlink(target, name, dir_fd=self.fd)

    def hand_over(self, *names: str) -> None:
        """Change the owner of complete directories to the tree's user; "" is the tree itself.

        Raises OSError.
        """
        if self.gid is None or self.uid is None:
            return
        for name in names:
            with Closing(self.enter(name)) as fd:
                os.fchmod(fd, 0o700)
                os.fchown(fd, self.uid, self.gid)

    def take_back(self, name: str, mode: int) -> None:
        """Make the caller the owner of a directory again and set its mode, but keep its group."""
        with Closing(os.open(name, DIRECTORY, dir_fd=self.fd)) as fd:
            if os.fstat(fd).st_uid != os.geteuid():
                os.fchown(fd, os.geteuid(), -1)
                os.fchmod(fd, mode)

    def open_file(self, name: str, flags: int = READ) -> int:
        """Open a regular file, for reading by default, and return its descriptor.

        Raises OSError if the file cannot be opened; a ForeignFileError if it is not a regular file
        or belongs to another user.
        """
        with self._parent(name) as (there, last):
            return self._checked(os.open(last, flags, dir_fd=there), name)

    def open_listed(self, name: str, last: str, above: int) -> int:
        """Like `open_file`, in an open directory; unchecked if no other user can change the tree.

        A named pipe in place of a file does not block, and reads as an empty file.
        """
        fd = os.open(last, READ, dir_fd=above)
        return self._checked(fd, name) if self.is_foreign else fd

    def read(self, name: str, limit: int) -> bytes:
        """Read at most the first `limit` bytes of a file. Raises the errors of `open_file`."""
        with Closing(self.open_file(name)) as fd:
            return os.read(fd, min(limit, os.fstat(fd).st_size or limit))

    def create(self, last: str, above: int) -> int:
        """Create a file of mode 0600 in an open directory and open it. Raises OSError."""
        fd = os.open(last, _NEW, 0o600, dir_fd=above)
        if self.gid is not None and self.uid is not None:
            os.fchown(fd, self.uid, self.gid)
        return fd

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically; it replaces an existing one. Raises OSError."""
        with self._parent(name) as (there, last):
            fresh = f".{last}.{os.urandom(4).hex()}"
            fd = self.create(fresh, there)
            try:
                with Closing(fd):
                    while data:
                        data = data[os.write(fd, data) :]
                os.rename(fresh, last, src_dir_fd=there, dst_dir_fd=there)
            except BaseException:
                quietly(os.unlink, fresh, dir_fd=there)
                raise

    def patch(self, name: str, offset: int, data: bytes) -> None:
        """Overwrite bytes of a file in place. Raises the errors of `open_file`."""
        with Closing(self.open_file(name, READ | os.O_WRONLY)) as fd:
            os.pwrite(fd, data, offset)

    def status(self, name: str) -> os.stat_result | None:
        """The status of an entry, without following a link; None if there is no such entry."""
        try:
            with self._parent(name) as (there, last):
                return os.stat(last, dir_fd=there, follow_symlinks=False)
        except OSError:
            return None

    def entries(self, name: str = "") -> list[tuple[str, os.stat_result]]:
        """The names in a directory, sorted, each with its status. Raises OSError."""
        found = []
        with Closing(self.enter(name)) as there, os.scandir(there) as entries:
            for entry in entries:
                try:
                    found.append((entry.name, entry.stat(follow_symlinks=False)))
                except FileNotFoundError:
                    continue  # removed in the meantime
        return sorted(found, key=lambda one: one[0])

    def is_directory(self, name: str, status: os.stat_result) -> bool:
        """Whether an entry is a directory, or a link to one that PostgreSQL itself creates."""
        link = stat.S_ISLNK(status.st_mode) and name.startswith(_OF_POSTGRES)
        return stat.S_ISDIR(status.st_mode) or (link and not self.is_foreign)

    def remove(self, name: str) -> None:
        """Remove a file or a directory; leave entries that cannot be removed, without an error."""
        with self._parent(name) as (there, last):
            for _ in removal_at(there, last, self.uid if self.is_foreign else None):
                pass

    def rename(self, name: str, new: str) -> None:
        """Rename an entry of the top directory. Raises OSError."""
        os.rename(name, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)


def kind_of(mode: int) -> str:
    """The type of a file, for messages."""
    return _KINDS.get(stat.S_IFMT(mode), "a regular file")
