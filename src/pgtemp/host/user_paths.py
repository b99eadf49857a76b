"""Paths that the user specified, in directories that another user may change.

If the caller is root, a link or a renamed directory below another user's directory could redirect
root to any file. The path is therefore resolved one name at a time. As long as all directories
belong to root or to the caller, a link is followed if it also belongs to root or to the caller.
Below the first directory of another user, no link is followed, and every entry must belong to that
user.

A caller that is not root has no additional privileges to protect, so the path is resolved in the
usual way.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import Self

from pgtemp.host.openat import DIRECTORY, PASSAGE
from pgtemp.host.tree import ForeignFileError, Tree

StrPath = str | os.PathLike[str]
_MAX_LINKS = 40  # MAXSYMLINKS, linux/namei.h


@dataclass(slots=True)
class Location:
    """The open directory that contains the last part of a path, and the name of that part.

    Attributes:
        fd: the directory's descriptor.
        uid: the other user whose directory contains the path; None if there is none.
    """

    fd: int
    directory: str
    name: str
    uid: int | None = None

    @property
    def path(self) -> str:
        """The path without links."""
        return f"{self.directory.rstrip('/')}/{self.name}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def locate(path: StrPath) -> Location:
    """Resolve a path; its last part need not exist.

    Raises OSError if a directory does not exist; a ForeignFileError if another user could redirect
    the path.
    """
    if os.geteuid() != 0:
        above, name = os.path.split(os.path.realpath(path))
        return Location(os.open(above, PASSAGE), above, name)
    named = os.fspath(path)  # the working directory may have been removed
    return _walk(named if named.startswith("/") else os.path.join(os.getcwd(), named))


def _walk(path: str) -> Location:
    at = Location(os.open("/", PASSAGE), "/", ".")
    to_do = _parts(path)
    links = 0
    try:
        while to_do:
            name = to_do.pop()
            status = _status(at, name)
            if status is not None and stat.S_ISLNK(status.st_mode):
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                if at.uid is not None or status.st_uid not in (0, os.geteuid()):
                    raise ForeignFileError(f"{at.directory}/{name}", "is a link of another user")
                target = os.readlink(name, dir_fd=at.fd)
                if target.startswith("/"):
                    _enter(at, "/", "/")
                to_do += _parts(target)
            elif not to_do and name != "..":
                at.name = name
                return at
            else:
                _enter(at, name, os.path.normpath(os.path.join(at.directory, name)))
    except BaseException:
        os.close(at.fd)
        raise
    return at


def _parts(path: str) -> list[str]:
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _status(at: Location, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=at.fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _enter(at: Location, name: str, path: str) -> None:
    if name == ".." and at.uid is not None:
        raise ForeignFileError(path, f"leads back out of a directory of uid {at.uid}")
    fd = os.open(name, PASSAGE, dir_fd=at.fd)
    os.close(at.fd)
    at.fd, at.directory = fd, path
    owner = os.fstat(fd).st_uid
    if at.uid is not None and owner != at.uid:
        raise ForeignFileError(path, f"belongs to uid {owner}, but its directory to uid {at.uid}")
    if owner not in (0, os.geteuid()):
        at.uid = owner


def open_tree(path: StrPath) -> Tree:
    """Open the tree at a path. Raises the errors of `locate`; OSError if it is not a directory."""
    with locate(path) as at:
        fd = os.open(at.name, DIRECTORY, dir_fd=at.fd)
        owner = os.fstat(fd).st_uid
        if at.uid is not None and owner != at.uid:
            os.close(fd)
            raise ForeignFileError(
                at.path, f"belongs to uid {owner}, but its directory to uid {at.uid}"
            )
        return Tree(fd, at.path, owner if os.geteuid() == 0 else None)


def open_file(path: StrPath, flags: int = os.O_RDONLY) -> int:
    """Open a file that an option specifies, and return its descriptor.

    Raises the errors of `locate`; a ForeignFileError if root would write to a file of another user,
    or read a file in another user's directory that does not belong to that user.
    """
    if os.geteuid() != 0:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)
    writes = flags & (os.O_WRONLY | os.O_RDWR)
    with locate(path) as at:
        shared = at.uid is not None or os.fstat(at.fd).st_mode & 0o022
        careful = os.O_NOFOLLOW | (os.O_NONBLOCK if shared else 0)
        fd = os.open(at.name, flags | careful | os.O_CLOEXEC, 0o600, dir_fd=at.fd)
        status = os.fstat(fd)
        owner = status.st_uid
        if writes and shared and stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            os.close(fd)  # another user may have linked a file of root
            raise ForeignFileError(at.path, "has another name, too")
        if (writes and owner not in (0, os.geteuid())) or (at.uid is not None and owner != at.uid):
            os.close(fd)
            raise ForeignFileError(at.path, f"belongs to uid {owner}")
        return fd


def read_file(path: StrPath) -> bytes:
    """The contents of a file that an option specifies. Raises the errors of `open_file`."""
    with open(open_file(path), "rb") as file:
        return file.read()
