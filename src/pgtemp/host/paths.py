"""The locations of the cache, of persisted data and of run directories.

Run directories are placed on a tmpfs that has enough space, because the creation of files dominates
the cost of a database: on ext4, after many files were created and deleted, a clone takes thirty
times as long. Persisted data is placed on disk.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

from pgtemp.errors import OptionError
from pgtemp.host import disk_space, procfs, trusted
from pgtemp.host.identity import Identity
from pgtemp.host.openat import DIRECTORY, Closing

# Bytes a tmpfs must have free to be chosen: several clusters of 30 MB with some data in them.
# The 64 MB /dev/shm of a container is never enough.
TMPFS_ROOM = 256 * 1024 * 1024
_SHARED_MEMORY = Path("/dev/shm")
# sockaddr_un.sun_path has 108 bytes on Linux and 104 on macOS, including the terminating zero byte.
SOCKET_PATH_BYTES = 103
_CACHE_REMEDY = "set PGTEMP_CACHE_DIR to a directory that you own"
_PREFIX_REMEDY = "specify another directory (data_dir_prefix)"


def cache_dir() -> Path:
    """The cache directory, which contains the images; it is created if it does not exist.

    For root it is /var/cache/pgtemp rather than a directory below /root, because the server user
    must be able to read its files. PGTEMP_CACHE_DIR overrides it. Raises OptionError if it cannot
    be created, is not writable, or can be changed by other users (trusted.py).
    """
    named = bool(os.environ.get("PGTEMP_CACHE_DIR"))
    what, path = "PGTEMP_CACHE_DIR" if named else "the cache", usual_cache_dir()
    reason = _make(path, what, _CACHE_REMEDY)
    if reason and not named and os.geteuid() != 0:  # the home directory is not writable
        path = _fallback_cache()
        reason = _make(path, what, _CACHE_REMEDY)
    if reason:
        raise OptionError(f"{what} {path}: {reason}", remedy=_CACHE_REMEDY)
    return path


def usual_cache_dir() -> Path:
    """The preferred cache directory; it may not exist or may be unusable (see `cache_dir`)."""
    if given := os.environ.get("PGTEMP_CACHE_DIR"):
        return Path(given).absolute()
    if os.geteuid() == 0:
        return Path("/var/cache/pgtemp")
    return _of_user(platformdirs.user_cache_dir) or _fallback_cache()


def _fallback_cache() -> Path:
    return temporary_dir() / f"pgtemp-cache-{os.geteuid()}"


def _of_user(find: Callable[[str], str]) -> Path | None:
    """A directory below the user's home directory; None if that is not known."""
    try:
        path = Path(find("pgtemp"))
    except RuntimeError:
        return None
    return path if path.is_absolute() else None


def _make(path: Path, what: str, remedy: str) -> str | None:
    """Create a trusted directory unless it exists; return the reason if that fails, else None.

    Raises OptionError if other users could change it.
    """
    try:
        if not path.is_dir():
            nearest = next(one for one in path.parents if one.exists())
            if os.access(nearest, os.W_OK | os.X_OK):
                # Checked before anything is created: another user's link could redirect it.
                trusted.check(path, what, remedy, sticky=False)
            make_dirs(path)
        if not os.access(path, os.W_OK | os.X_OK):
            return trusted.find_flaw(path, sticky=False) or "it is not writable"
        trusted.check(path, what, remedy, sticky=False)
    except OSError as error:
        return error.strerror or str(error)
    return None


def make_dirs(path: Path) -> None:
    """Create a directory and its missing parents.

    Root's umask may be 077, but the server user must be able to enter them.
    """
    for directory in [*reversed(path.parents), path]:
        if directory.is_dir():
            continue
        try:
            directory.mkdir(mode=0o755)
        except FileExistsError:
            if not directory.is_dir():
                raise
        else:
            if os.geteuid() == 0:
                with Closing(os.open(directory, DIRECTORY)) as made:
                    os.fchmod(made, 0o755)


def check_umask() -> None:
    """Raise OptionError if the umask would deny this process access to the files it creates."""
    status = procfs.lines("self/status")  # os.umask would set it, for all threads
    umasks = [line.split()[1] for line in status if line.startswith("Umask:")]
    if umasks and int(umasks[0], 8) & 0o700:
        raise OptionError(
            f"the umask {umasks[0]} denies the owner access to their own files",
            remedy="set the umask to 022 or 077 before you start pgtemp",
        )


def scratch_base(prefix: str | os.PathLike[str] | None, *, keep: bool) -> Path:
    """The directory in which a run directory is created.

    Raises OptionError if the requested directory cannot be used, or other users could change it.

    Args:
        prefix: the requested directory; None chooses one.
        keep: whether the data is persisted; the directory must then not be on tmpfs.
    """
    if prefix is not None:
        return _given_base(Path(prefix), keep=keep)
    if keep:
        return _persisted_base()
    if _has_room(_SHARED_MEMORY):
        return _SHARED_MEMORY
    return temporary_dir()


def temporary_dir() -> Path:
    """The directory for temporary files: TMPDIR if it is writable, else /tmp or /var/tmp.

    Raises OptionError if none of them is writable, or other users could change the selected one.
    """
    try:
        path = Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise OptionError(
            "no directory for temporary files is writable (tried TMPDIR, /tmp and /var/tmp)",
            remedy="set TMPDIR to a writable directory",
        ) from None
    remedy = "set TMPDIR to a directory that you own"
    trusted.check(path, "the directory for temporary files", remedy, sticky=True)
    return path.resolve()


def _given_base(prefix: Path, *, keep: bool) -> Path:
    base = prefix.expanduser().absolute()
    remedy = "specify an existing, writable directory (data_dir_prefix)"
    if not base.is_dir():
        raise OptionError(f"{base} is not a directory", remedy=remedy)
    if not os.access(base, os.W_OK | os.X_OK) or os.statvfs(base).f_flag & os.ST_RDONLY:
        raise OptionError(f"{base} is not writable", remedy=remedy)
    if keep and filesystem_type(base) in ("tmpfs", "ramfs"):
        raise OptionError(
            f"{base} is on {filesystem_type(base)}, which does not survive a reboot",
            remedy="specify a directory on disk (data_dir_prefix), or omit persist",
        )
    trusted.check(base, "the directory", _PREFIX_REMEDY, sticky=True)
    return base


def _persisted_base() -> Path:
    root = os.geteuid() == 0
    base = Path("/var/lib/pgtemp") if root else _of_user(platformdirs.user_data_dir)
    if base is None:
        raise OptionError(
            "the user has no home directory, which would contain the persisted data",
            remedy="set HOME, or specify a directory (data_dir_prefix)",
        )
    if reason := _make(base, "the directory for persisted data", _PREFIX_REMEDY):
        raise OptionError(
            f"{base}, the directory for persisted data, cannot be created: {reason}",
            remedy=_PREFIX_REMEDY,
        )
    return _given_base(base, keep=True)


def sweep_bases() -> list[Path]:
    """The directories in which owners that have exited may have left run directories."""
    return [base for base in [_SHARED_MEMORY, *_temporary()] if base.is_dir() and _is_safe(base)]


def _temporary() -> list[Path]:
    try:
        return [temporary_dir()]
    except OptionError:  # not needed if the options name every directory
        return []


def _is_safe(base: Path) -> bool:
    return trusted.find_flaw(base, sticky=True) is None


def socket_base(owner: Identity) -> Path:
    """A directory whose path is short enough for the sockets in its subdirectories.

    Raises OptionError if there is no such directory.

    Args:
        owner: the server user, who must be able to enter it.
    """
    for base in (*_temporary(), Path("/tmp"), _SHARED_MEMORY):
        if (
            len(os.fsencode(base)) < SOCKET_PATH_BYTES - 40
            and os.access(base, os.W_OK | os.X_OK)
            and owner.blocked_at(base) is None
            and _is_safe(base)
        ):
            return base
    raise OptionError(
        "no directory that is writable, and that other users cannot change, has a path short "
        "enough for a unix socket",
        remedy="set TMPDIR to a directory whose path is shorter than 60 bytes",
    )


def is_noexec(path: Path) -> bool:
    """Whether the file system of `path` is mounted noexec, so that programs there cannot be run."""
    return bool(os.statvfs(path).f_flag & getattr(os, "ST_NOEXEC", 0))


def filesystem_type(path: Path) -> str:
    """The type of the file system that contains `path`, as the kernel reports it; "" if unknown."""
    real = os.path.realpath(path)
    best, kind = "", ""
    for line in procfs.lines("self/mounts"):
        fields = line.split()
        point = fields[1].encode().decode("unicode_escape")
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def _has_room(base: Path) -> bool:
    return (
        os.access(base, os.W_OK | os.X_OK)
        and filesystem_type(base) == "tmpfs"
        and disk_space.free_bytes(base) >= TMPFS_ROOM
        and _is_safe(base)
    )
