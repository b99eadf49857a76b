"""The free space of a disk, and the error raised if there is too little.

A disk without free inodes counts as full, even if it has free bytes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pgtemp.errors import ClusterError, DiskFullError
from pgtemp.host.openat import DIRECTORY, Closing

REMEDY = "free some space, or choose another directory (data_dir_prefix)"
CACHE_REMEDY = "free some space, or choose another directory (PGTEMP_CACHE_DIR)"
# PostgreSQL shuts down and disconnects every client when it cannot write its WAL, so this much
# space must stay free; on a small disk, only this fraction of the disk.
_SPARE_BYTES, _SPARE_PART = 64 << 20, 8
_SPARE_FILES = 64
RESERVE = "spare"  # the name of the file that reserves space
_RESERVE_BYTES = 2 << 20  # enough for a checkpoint and one WAL segment
_NOTHING = 1 << 20  # bytes; with less free space, a server cannot work at all
_NO_LIMIT = 1 << 62  # bytes; a ramfs, or a tmpfs of size=0, reports no blocks at all
# The depth to which `size_of` descends, more than PostgreSQL uses; each level takes a descriptor.
_DEEPEST = 16
_FULL = (errno.ENOSPC, errno.EDQUOT)
# PostgreSQL's messages about a full disk; the last one reports that only part of a page was
# written.
_FULL_WORDS = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), ": wrote only ")


def size_bytes(path: Path) -> int:
    """The size in bytes of the file system that holds `path`."""
    status = _status(path)
    return status.f_blocks * status.f_frsize or _NO_LIMIT


def free_bytes(path: Path) -> int:
    """The bytes that an unprivileged user can still write there; `path` itself need not exist."""
    status = _status(path)
    return status.f_bavail * status.f_frsize if status.f_blocks else _NO_LIMIT


def free_text(path: Path) -> str:
    """The free space of the file system of `path`, as text for messages."""
    if _free_files(_status(path)) == 0:
        return "no free inodes"
    if free_bytes(path) == _NO_LIMIT:
        return "unlimited free space"
    return f"{free_bytes(path) >> 20} MB free"


def is_full(path: Path) -> bool:
    """Whether the file system of `path` has no usable space left."""
    return free_bytes(path) < _NOTHING or _free_files(_status(path)) == 0


def says_full(words: str) -> bool:
    """Whether a program's output reports a full disk."""
    return any(one in words for one in _FULL_WORDS)


def check_with_spare(path: Path, what: str, *, size: int, files: int) -> None:
    """Like `check`, but additionally require a reserve for a server that runs there."""
    size += min(_SPARE_BYTES, size_bytes(path) // _SPARE_PART)
    check(path, what, size=size, files=files + _SPARE_FILES)


def check(path: Path, what: str, *, size: int, files: int, remedy: str = REMEDY) -> None:
    """Raise DiskFullError if `size` bytes in `files` files do not fit on the file system of `path`.

    Args:
        what: the purpose of the space, for the message, such as "another database".
    """
    free_files = _free_files(_status(path))
    if free_bytes(path) < size:
        need = f"{size >> 20} MB"
    elif free_files is not None and free_files < files:
        need = f"{files} files"
    else:
        return
    raise DiskFullError(
        f"{path} has too little free space for {what}: {free_text(path)}, {need} needed",
        remedy=remedy,
    )


def cannot_write(where: Path, error: OSError, remedy: str = REMEDY) -> ClusterError:
    """The error for a failed write to a file or directory; it states the free space."""
    if error.errno == errno.EFBIG:
        remedy = "raise the file size limit (ulimit -f)"
    kind = DiskFullError if error.errno in _FULL else ClusterError
    return kind(
        f"cannot write to {where}: {error.strerror or error} ({free_text(where)})", remedy=remedy
    )


def put_aside(directory: Path) -> None:
    """Reserve some disk space in a file, for `reserve_released`; do nothing if no space is free."""
    try:
        with open(directory / RESERVE, "xb") as file:
            os.posix_fallocate(file.fileno(), 0, _RESERVE_BYTES)  # written zeros may be compressed
    except FileExistsError:
        pass
    except (OSError, AttributeError):  # macOS has no posix_fallocate
        (directory / RESERVE).unlink(missing_ok=True)


@contextmanager
def reserve_released(directory: Path) -> Iterator[None]:
    """If the disk is full, free the reserved space for the duration of a block."""
    if not is_full(directory):
        yield
        return
    (directory / RESERVE).unlink(missing_ok=True)
    try:
        yield
    finally:
        put_aside(directory)


@contextmanager
def writing(where: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Convert an OSError of a block into an error that states the path and the free space.

    Raises ClusterError if writing a file failed; a DiskFullError if the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(where, error, remedy) from error


def _status(path: Path) -> os.statvfs_result:
    for directory in (path, *path.parents):
        try:
            return os.statvfs(directory)
        except FileNotFoundError:
            continue
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _free_files(status: os.statvfs_result) -> int | None:
    """The number of free inodes; None if there is no limit."""
    return status.f_favail if status.f_files else None


def size_of(directory: int, levels: int = _DEEPEST) -> int:
    """Bytes on disk of the files below an open directory; a file removed meanwhile does not count.

    It follows no link and enters no other file system, because the directory may belong to another
    user.
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
        with suppress(OSError), Closing(os.open(name, DIRECTORY, dir_fd=directory)) as inner:
            if os.fstat(inner).st_dev == device:
                size += size_of(inner, levels - 1)
    return size
