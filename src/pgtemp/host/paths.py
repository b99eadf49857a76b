"""Where things go: the cache, kept data, scratch directories.

Scratch goes to tmpfs where it has room, because creating files decides what a database costs: on
ext4 after much creation and deletion a clone takes thirty times as long. Kept data goes to disk.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import platformdirs

from pgtemp.errors import OptionError
from pgtemp.host import room

# Bytes a tmpfs must have free to be chosen: several clusters of 30 MB with some data in them.
# The 64 MB /dev/shm of a container is never enough.
TMPFS_ROOM = 256 * 1024 * 1024
_SHARED_MEMORY = Path("/dev/shm")
# sockaddr_un.sun_path has 108 bytes on Linux and 104 on macOS, with the final zero.
SOCKET_PATH_BYTES = 103


def cache_dir() -> Path:
    """The directory of images; made if need be.

    Root's is /var/cache/pgtemp rather than below /root, because the user that PostgreSQL is run
    as has to reach what is in it. PGTEMP_CACHE_DIR names another.

    Raises:
        OptionError: it cannot be made or written.
    """
    path = usual_cache_dir()
    if os.environ.get("PGTEMP_CACHE_DIR"):
        return _made(path, "PGTEMP_CACHE_DIR")
    if os.geteuid() == 0:
        return _made(path, "the cache")
    try:
        return _made(path, "the cache")
    except OptionError:  # no home, or a read-only one
        return _private(Path(tempfile.gettempdir()) / f"pgtemp-cache-{os.getuid()}")


def usual_cache_dir() -> Path:
    """Where images are unless that cannot be; it may be missing."""
    if given := os.environ.get("PGTEMP_CACHE_DIR"):
        return Path(given).absolute()
    if os.geteuid() == 0:
        return Path("/var/cache/pgtemp")
    return Path(platformdirs.user_cache_dir("pgtemp"))


def _made(path: Path, what: str) -> Path:
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        if os.access(path, os.W_OK | os.X_OK):
            return path
        reason = "it cannot be written"
    except OSError as error:
        reason = error.strerror or str(error)
    raise OptionError(
        f"{what} {path}: {reason}", remedy="name a directory of yours in PGTEMP_CACHE_DIR"
    )


def _private(path: Path) -> Path:
    path = _made(path, "the cache")
    status = path.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OptionError(
            f"the cache {path} belongs to somebody else",
            remedy="name a directory of yours in PGTEMP_CACHE_DIR",
        )
    return path


def scratch_base(prefix: str | os.PathLike[str] | None, *, keep: bool) -> Path:
    """The directory in which a server's home is made.

    Args:
        prefix: the directory asked for; None chooses one.
        keep: the data is to be kept, so it must not be on tmpfs.

    Raises:
        OptionError: the directory asked for cannot be used.
    """
    if prefix is not None:
        return _given_base(Path(prefix), keep=keep)
    if keep:
        return _kept_base()
    if _has_room(_SHARED_MEMORY):
        return _SHARED_MEMORY
    return Path(tempfile.gettempdir()).resolve()


def _given_base(prefix: Path, *, keep: bool) -> Path:
    base = prefix.expanduser().absolute()
    remedy = "name a directory that exists and can be written (data_dir_prefix)"
    if not base.is_dir():
        raise OptionError(f"{base} is not a directory", remedy=remedy)
    if not os.access(base, os.W_OK | os.X_OK) or os.statvfs(base).f_flag & os.ST_RDONLY:
        raise OptionError(f"{base} cannot be written", remedy=remedy)
    if keep and filesystem_type(base) in ("tmpfs", "ramfs"):
        raise OptionError(
            f"{base} is on {filesystem_type(base)}, where nothing is kept for long",
            remedy="name a directory on disk (data_dir_prefix), or leave persist out",
        )
    return base


def _kept_base() -> Path:
    root = os.geteuid() == 0
    base = Path("/var/lib/pgtemp") if root else Path(platformdirs.user_data_dir("pgtemp"))
    try:
        base.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"{base}, where kept data goes, cannot be made: {error.strerror}",
            remedy="name another directory (data_dir_prefix)",
        ) from error
    return _given_base(base, keep=True)


def sweep_bases() -> list[Path]:
    """Where homes may have been left by owners that are gone."""
    bases = [_SHARED_MEMORY, Path(tempfile.gettempdir()).resolve()]
    return [base for base in bases if base.is_dir()]


def socket_base() -> Path:
    """A directory whose path is short enough for the sockets in its subdirectories."""
    for base in (Path(tempfile.gettempdir()), Path("/tmp"), _SHARED_MEMORY):
        if len(os.fsencode(base)) < SOCKET_PATH_BYTES - 40 and os.access(base, os.W_OK | os.X_OK):
            return base
    raise OptionError(
        "no directory is short enough for a unix socket",
        remedy="set TMPDIR to a directory with a path below 60 bytes",
    )


def filesystem_type(path: Path) -> str:
    """The type of the filesystem that holds `path`, as the kernel names it; "" if unknown."""
    real = os.path.realpath(path)
    best, kind = "", ""
    try:
        with open("/proc/self/mounts") as mounts:
            for line in mounts:
                fields = line.split()
                point = fields[1].encode().decode("unicode_escape")
                inside = real == point or real.startswith(point.rstrip("/") + "/")
                if inside and len(point) >= len(best):
                    best, kind = point, fields[2]
    except OSError:
        pass
    return kind


def _has_room(base: Path) -> bool:
    return (
        os.access(base, os.W_OK | os.X_OK)
        and filesystem_type(base) == "tmpfs"
        and room.free_bytes(base) >= TMPFS_ROOM
    )
