"""Directory trees that another user may change, reached through descriptors alone.

The owner of a server may be root, and PostgreSQL then runs as another user, as whom a client can
run programs. In a directory of that user a path can lead anywhere a moment after it was checked.
So this module is the only one that works with files below a data directory, which a test checks
(`tests/test_architecture.py`). Every step goes from an open directory to one name in it, and never
follows a link. A file is opened without blocking, and used only if the open descriptor is of a
regular file that belongs to the expected user. A new file must not exist before.

The supervisor's process imports it too, so it imports nothing that is slow.
"""

from __future__ import annotations

import errno
import os
import stat

from pgtemp.host.openat import DIRECTORY, READ, quietly
from pgtemp.host.removal import removal_at

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    StrPath = str | os.PathLike[str]

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# PostgreSQL itself makes these links: initdb --waldir, CREATE TABLESPACE.
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
    """A file or directory is not what it must be: of another kind, or of another user."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(errno.EPERM, reason, name)


class Tree:
    """An open directory, and all below it.

    Args:
        fd: its descriptor, which the tree closes in the end.
        path: only for messages and for programs that run as the directory's user.
        uid: the user to whom everything in it must belong; None if that does not matter, because
            the caller has no more rights than that user.
        gid: the group that new files get, together with that user; None if they are the caller's.
    """

    __slots__ = ("_held", "fd", "gid", "path", "uid")

    def __init__(self, fd: int, path: str, uid: int | None, gid: int | None = None) -> None:
        self.fd, self.path, self.uid, self.gid = fd, path, uid, gid
        self._held: dict[str, int] = {}

    @classmethod
    def open(cls, path: StrPath) -> Tree:
        """The tree at a path whose parent directory is trusted.

        All below must belong to the user of the directory itself, if the caller is root.

        Raises:
            OSError: it is missing, a link, or not a directory.
        """
        fd = os.open(path, DIRECTORY)
        uid = os.fstat(fd).st_uid if os.geteuid() == 0 else None
        return cls(fd, os.fspath(path), uid)

    @classmethod
    def reach(cls, path: StrPath) -> Tree:
        """The tree at a path through directories of root, of the caller, and then of one user.

        A user who can change a directory on the way could lead the caller elsewhere. So where a
        directory belongs to another user, all below must belong to that user as well.

        Raises:
            OSError: it is missing, or not a directory; a ForeignFileError if it belongs to another
                user than a directory above it.
        """
        whole = os.path.realpath(path)
        trusted, uid = (0, os.geteuid()), None
        fd, so_far = os.open("/", DIRECTORY), ""
        try:
            for name in whole.split("/"):
                if not name:
                    continue
                below = os.open(name, DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd, so_far = below, f"{so_far}/{name}"
                owner = os.fstat(fd).st_uid
                if uid is not None and owner != uid:
                    raise ForeignFileError(
                        so_far, f"belongs to uid {owner}, below one of uid {uid}"
                    )
                if owner not in trusted:
                    uid = owner
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, whole, os.fstat(fd).st_uid if os.geteuid() == 0 else None)

    def __enter__(self) -> Tree:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the tree; the second time nothing happens."""
        self.release()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def hold(self, *names: str) -> None:
        """Keep directories open, so that later steps start from what is there now.

        Raises OSError as `enter`.
        """
        for name in names:
            self._held[name] = self.enter(name)

    def release(self) -> None:
        """Close the directories that `hold` keeps open."""
        while self._held:
            os.close(self._held.popitem()[1])

    @property
    def is_foreign(self) -> bool:
        """Whether it belongs to another user than the caller, who is root."""
        return self.uid is not None and self.uid != os.geteuid()

    def enter(self, name: str) -> int:
        """A new descriptor of a directory below, or of the tree itself for "".

        Raises:
            OSError: it is missing, a link, or another user's.
        """
        held = self._held.get(name)
        if held is not None or not name:
            return os.dup(self.fd if held is None else held)
        above, _, last = name.rpartition("/")
        there = self.enter(above)
        try:
            flags = DIRECTORY
            if name.startswith(_OF_POSTGRES) and not self.is_foreign:
                flags &= ~os.O_NOFOLLOW
            return self._checked(os.open(last, flags, dir_fd=there), name, directory=True)
        finally:
            os.close(there)

    def _checked(self, fd: int, name: str, *, directory: bool = False) -> int:
        status = os.fstat(fd)
        reason = ""
        if directory and self.gid is not None and status.st_uid == os.geteuid():
            return fd  # made here, and not handed over yet
        if not directory and not stat.S_ISREG(status.st_mode):
            reason = f"is {kind_of(status.st_mode)}, not a regular file"
        elif self.uid is not None and status.st_uid != self.uid:
            reason = f"belongs to uid {status.st_uid}, not to uid {self.uid}"
        if reason:
            os.close(fd)
            raise ForeignFileError(f"{self.path}/{name}", reason)
        return fd

    def below(self, name: str) -> Tree:
        """The tree of a directory below. Raises OSError as `enter`."""
        return Tree(self.enter(name), f"{self.path}/{name}", self.uid, self.gid)

    def make_directory(self, name: str, mode: int = 0o700) -> None:
        """Make a directory, which is the caller's until `hand_over`. Raises OSError."""
        with _Place(self, name) as (there, last):
            os.mkdir(last, mode, dir_fd=there)
            fd = os.open(last, DIRECTORY, dir_fd=there)
        try:
            os.fchmod(fd, mode)  # whatever the umask is
        finally:
            os.close(fd)

    def link(self, name: str, target: str) -> None:
        """Make a symbolic link in the directory itself. Raises OSError."""
        os.symlink(target, name, dir_fd=self.fd)

    def hand_over(self, *names: str) -> None:
        """Give complete directories to the tree's user; "" is the tree itself. Raises OSError."""
        if self.gid is None or self.uid is None:
            return
        for name in names:
            with _Place(self, f"{name}/") as (there, _):
                os.fchmod(there, 0o700)
                os.fchown(there, self.uid, self.gid)

    def open_file(self, name: str, flags: int = READ) -> int:
        """The descriptor of a regular file, for reading.

        Raises:
            OSError: it is missing; a ForeignFileError if it is of another kind or another user's.
        """
        with _Place(self, name) as (there, last):
            return self._checked(os.open(last, flags, dir_fd=there), name)

    def open_listed(self, name: str, last: str, above: int) -> int:
        """As `open_file`, in an open directory; without checks if nobody else can change the tree.

        A pipe in place of a file does not block, and reads as an empty file.
        """
        fd = os.open(last, READ, dir_fd=above)
        return self._checked(fd, name) if self.is_foreign else fd

    def read(self, name: str, most: int) -> bytes:
        """The first bytes of a file, at most so many. Raises OSError as `open_file`."""
        fd = self.open_file(name)
        try:
            return os.read(fd, min(most, os.fstat(fd).st_size or most))
        finally:
            os.close(fd)

    def create(self, last: str, above: int) -> int:
        """The descriptor of a new file of mode 0600 in an open directory. Raises OSError."""
        fd = os.open(last, _NEW, 0o600, dir_fd=above)
        if self.gid is not None and self.uid is not None:
            os.fchown(fd, self.uid, self.gid)
        return fd

    def write(self, name: str, data: bytes) -> None:
        """Write a file, which replaces another of that name. Raises OSError."""
        with _Place(self, name) as (there, last):
            fresh = f".{last}.{os.urandom(4).hex()}"
            fd = self.create(fresh, there)
            try:
                try:
                    while data:
                        data = data[os.write(fd, data) :]
                finally:
                    os.close(fd)
                os.rename(fresh, last, src_dir_fd=there, dst_dir_fd=there)
            except BaseException:
                quietly(os.unlink, fresh, dir_fd=there)
                raise

    def patch(self, name: str, offset: int, data: bytes) -> None:
        """Overwrite bytes within a file. Raises OSError as `open_file`."""
        fd = self.open_file(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.pwrite(fd, data, offset)
        finally:
            os.close(fd)

    def status(self, name: str) -> os.stat_result | None:
        """What the system says of a name, of a link itself; None if there is no such name."""
        try:
            with _Place(self, name) as (there, last):
                return os.stat(last, dir_fd=there, follow_symlinks=False)
        except OSError:
            return None

    def entries(self, name: str = "") -> list[tuple[str, os.stat_result]]:
        """The names in a directory, sorted, with what the system says of each.

        Raises:
            OSError: the directory cannot be read.
        """
        found = []
        with _Place(self, f"{name}/") as (there, _), os.scandir(there) as entries:
            for entry in entries:
                try:
                    found.append((entry.name, entry.stat(follow_symlinks=False)))
                except FileNotFoundError:
                    continue  # removed in the meantime
        return sorted(found, key=lambda one: one[0])

    def is_directory(self, name: str, status: os.stat_result) -> bool:
        """Whether a name is of a directory, or of a link to one that PostgreSQL itself makes."""
        link = stat.S_ISLNK(status.st_mode) and name.startswith(_OF_POSTGRES)
        return stat.S_ISDIR(status.st_mode) or (link and not self.is_foreign)

    def remove(self, name: str) -> None:
        """Remove a file or a whole directory; a missing one, or one that resists, is left."""
        with _Place(self, name) as (there, last):
            for _ in removal_at(there, last, self.uid if self.is_foreign else None):
                pass

    def rename(self, name: str, new: str) -> None:
        """Rename an entry of the directory itself. Raises OSError."""
        os.rename(name, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)


class _Place:
    """The open directory in which the last part of a name is, for a block."""

    __slots__ = ("_fd", "_last", "_name", "_tree")

    def __init__(self, tree: Tree, name: str) -> None:
        self._tree = tree
        self._name, _, self._last = name.rpartition("/")
        self._fd = -1

    def __enter__(self) -> tuple[int, str]:
        self._fd = self._tree.enter(self._name)
        return self._fd, self._last

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._fd)


def kind_of(mode: int) -> str:
    """The kind of a file, for messages."""
    return _KINDS.get(stat.S_IFMT(mode), "a regular file")
