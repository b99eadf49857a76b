"""How much room there is on a disk, and the error where there is too little.

A disk on which no more files can be made (it has no inodes left) is full as well, whatever is free.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pgtemp.errors import ClusterError, DiskFullError

REMEDY = "make room, or name another directory (data_dir_prefix)"
CACHE_REMEDY = "make room, or name another directory in PGTEMP_CACHE_DIR"
# PostgreSQL stops with all who are in it when it cannot write its log, so this much stays free; of
# a disk that is small, a part.
_SPARE_BYTES, _SPARE_PART = 64 << 20, 8
_SPARE_FILES = 64
ASIDE = "spare"  # the file
_ASIDE_BYTES = 2 << 20  # for a checkpoint, and a segment of PostgreSQL's log
_NOTHING = 1 << 20  # bytes; with less, no server can do anything
_NO_LIMIT = 1 << 62  # bytes; a ramfs, or a tmpfs of size=0, reports no blocks at all
# Levels of directories that `size_of` enters, more than PostgreSQL has; each takes a descriptor.
_DEEPEST = 16
_FULL = (errno.ENOSPC, errno.EDQUOT)
# In PostgreSQL's words; the second is of a file that grew by a part of a page.
_FULL_WORDS = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), ": wrote only ")


def size_bytes(path: Path) -> int:
    """The size of the disk that `path` is on."""
    status = _status(path)
    return status.f_blocks * status.f_frsize or _NO_LIMIT


def free_bytes(path: Path) -> int:
    """Bytes an ordinary user can still write where `path` is, or would be."""
    status = _status(path)
    return status.f_bavail * status.f_frsize if status.f_blocks else _NO_LIMIT


def left(path: Path) -> str:
    """How much is free where `path` is, for people."""
    if _free_files(_status(path)) == 0:
        return "no more files can be made"
    if free_bytes(path) == _NO_LIMIT:
        return "free without limit"
    return f"{free_bytes(path) >> 20} MB free"


def is_full(path: Path) -> bool:
    """Whether nothing can be done any more where `path` is."""
    return free_bytes(path) < _NOTHING or _free_files(_status(path)) == 0


def says_full(words: str) -> bool:
    """Whether a program complains of a full disk."""
    return any(one in words for one in _FULL_WORDS)


def check_with_spare(path: Path, what: str, *, size: int, files: int) -> None:
    """As `check`, but some room has to be left for a server that runs there."""
    size += min(_SPARE_BYTES, size_bytes(path) // _SPARE_PART)
    check(path, what, size=size, files=files + _SPARE_FILES)


def check(path: Path, what: str, *, size: int, files: int, remedy: str = REMEDY) -> None:
    """Raise DiskFullError where there is no room for so many bytes and files.

    Args:
        what: needs them, as "another database".
    """
    free_files = _free_files(_status(path))
    if free_bytes(path) < size:
        need = f"{size >> 20} MB"
    elif free_files is not None and free_files < files:
        need = f"{files} files"
    else:
        return
    raise DiskFullError(
        f"{path} has too little room for {what}: {left(path)}, {need} needed", remedy=remedy
    )


def cannot_write(where: Path, error: OSError, remedy: str = REMEDY) -> ClusterError:
    """The error for a file or directory that could not be written, with how much room there is."""
    if error.errno == errno.EFBIG:
        remedy = "raise the limit on the size of files (ulimit -f)"
    kind = DiskFullError if error.errno in _FULL else ClusterError
    return kind(
        f"{where} cannot be written: {error.strerror or error} ({left(where)})", remedy=remedy
    )


def put_aside(directory: Path) -> None:
    """Put some room aside, in a file, for `spared`; where there is none, that is that."""
    try:
        with open(directory / ASIDE, "xb") as file:
            os.posix_fallocate(file.fileno(), 0, _ASIDE_BYTES)  # zeros may be compressed to nothing
    except FileExistsError:
        pass
    except (OSError, AttributeError):  # macOS has no such call
        (directory / ASIDE).unlink(missing_ok=True)


@contextmanager
def spared(directory: Path) -> Iterator[None]:
    """On a full disk, let a block have the room that was put aside."""
    if not is_full(directory):
        yield
        return
    (directory / ASIDE).unlink(missing_ok=True)
    try:
        yield
    finally:
        put_aside(directory)


@contextmanager
def writing(where: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Turn what goes wrong with files into the error that says where, and how much room there is.

    Raises:
        ClusterError: a DiskFullError where there is no room.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(where, error, remedy) from error


def _status(path: Path) -> os.statvfs_result:
    for place in (path, *path.parents):
        try:
            return os.statvfs(place)
        except FileNotFoundError:
            continue
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _free_files(status: os.statvfs_result) -> int | None:
    """None where there is no limit."""
    return status.f_favail if status.f_files else None


def size_of(directory: int, levels: int = _DEEPEST) -> int:
    """Bytes that the files in an open directory take; what vanishes meanwhile does not count.

    No link is followed and no other file system is entered: the directory may be another user's.
    """
    size, below = 0, []
    with os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    below.append(entry.name)
                else:
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
    device = os.fstat(directory).st_dev
    for name in below if levels else ():
        with suppress(OSError):
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            try:
                if os.fstat(inner).st_dev == device:
                    size += size_of(inner, levels - 1)
            finally:
                os.close(inner)
    return size
