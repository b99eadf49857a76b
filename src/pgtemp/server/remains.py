"""What servers leave behind, and taking it away: processes, kernel objects, directories.

Shared by the warden's process, so it imports nothing that is slow and nothing of pgtemp.
Liveness is told by a lock, never by a name or an age; a process is told by the directory it works
in, never by a pid that was written down.
"""

from __future__ import annotations

import _ctypes
import fcntl
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PREFIX = "pgtemp-"
ASIDE = ".gone"
LEASE = "lease"
NEW = ".new"  # of a file that gets its name when it is whole
DATA = "data"
KEEP = b"keep\n"
DISCARD = b"discard\n"
# A directory without a lease is being made right now, or was left half-made; only after this many
# seconds is it taken for the latter.
HALF_MADE = 3600.0

SIGKILL, SIGTERM = 9, 15
# What was killed is not gone at once: a process disappears from /proc before its memory is let go.
_TRIES, _MOMENT = 200, 0.005
_PATIENCE = 1000  # moments that a program gets to clean up
IPC_RMID = 0
# The C half, since `ctypes` itself takes 3 ms to import.
_libc = _ctypes.dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]


def libc(function: str, *arguments: int | None) -> int:
    """Call a function of the C library that Python has no name for; its result."""
    result: int = _ctypes.call_function(_ctypes.dlsym(_libc, function), arguments)
    return result


def postgres_in(data_dir: str) -> list[int]:
    """Ids of the PostgreSQL processes that work in `data_dir`.

    Every server process has its data directory as working directory and is run by the user who
    owns it, which a recycled pid cannot have by chance. A link in its place leads nowhere: it would
    lead to somebody else's server. Without /proc (macOS) nothing is found.
    """
    real = os.path.join(os.path.realpath(os.path.dirname(data_dir)), os.path.basename(data_dir))
    try:
        uid = os.lstat(real).st_uid
    except OSError:
        return []
    return [pid for pid, cwd in all_postgres() if cwd == real and _uid_of(pid) == uid]


def all_postgres() -> Iterator[tuple[int, str]]:
    """Every process of PostgreSQL that can be looked at, and the directory it works in."""
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            try:
                cwd = os.readlink(f"/proc/{name}/cwd")
                if os.path.basename(os.readlink(f"/proc/{name}/exe")).startswith("postgres"):
                    yield int(name), cwd
            except OSError:
                continue


def _uid_of(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return -1


def end_group(leader: int, gently: bool) -> Iterator[None]:
    """End a program that is not our child, with all in its process group; a moment a step.

    Args:
        gently: let it end by itself at first, and clean up.
    """
    if gently:
        _quietly(lambda: os.kill(leader, SIGTERM))
        for _ in range(_PATIENCE):
            try:
                os.killpg(leader, 0)
            except OSError:
                return
            yield
            time.sleep(_MOMENT)
    _quietly(lambda: os.killpg(leader, SIGKILL))
    yield


def clear_crashed(data_dir: str) -> None:
    """End what a killed postmaster left running in `data_dir`, and its SysV segment."""
    try:
        with open(os.path.join(data_dir, "postmaster.pid")) as file:
            segment = file.read().split("\n")[6].split()
    except (OSError, IndexError):
        segment = []
    for _ in range(_TRIES):
        orphans = postgres_in(data_dir)
        for pid in orphans:
            _quietly(lambda: os.kill(pid, SIGKILL))  # noqa: B023 - called at once
        if not orphans:
            break
        time.sleep(_MOMENT)
    if len(segment) == 2:
        for _ in range(_TRIES):
            if _segment_removed(int(segment[0]), int(segment[1])):
                break
            time.sleep(_MOMENT)


def _segment_removed(key: int, shmid: int) -> bool:
    """Remove a shared memory segment, if it is still the one; False while somebody has it."""
    try:
        with open("/proc/sysvipc/shm") as table:
            rows = [line.split() for line in table][1:]
    except OSError:
        return True
    attached = [row[6] for row in rows if int(row[0]) == key and int(row[1]) == shmid]
    if attached == ["0"]:
        libc("shmctl", shmid, IPC_RMID, None)
    return attached in ([], ["0"])


def removal(path: str) -> Iterator[None]:
    """Remove `path`, one entry a step; never follows a link, never fails."""
    parent, name = os.path.split(path)
    yield from _remove(name, os.open(parent, os.O_RDONLY | os.O_DIRECTORY), close=True)


def _remove(name: str, parent: int, close: bool = False) -> Iterator[None]:
    # By descriptors: whoever may write to the directory cannot lead a removal by root elsewhere.
    try:
        try:
            here = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        except OSError:
            _quietly(lambda: os.unlink(name, dir_fd=parent))
            return
        try:
            with os.scandir(here) as entries:
                found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
            for child, is_dir in found:
                if is_dir:
                    yield from _remove(child, here)
                else:
                    _quietly(lambda: os.unlink(child, dir_fd=here))  # noqa: B023 - called at once
                yield
        finally:
            os.close(here)
        _quietly(lambda: os.rmdir(name, dir_fd=parent))
    finally:
        if close:
            os.close(parent)


def _quietly(do: Callable[[], object]) -> None:
    try:
        do()
    except OSError:
        pass  # gone already, or not ours: the next sweep looks again


def sweep(base: str) -> Iterator[None]:
    """Take away what owners that are gone have left in `base`: processes, then directories."""
    try:
        names = [name for name in os.listdir(base) if name.startswith(PREFIX)]
    except OSError:
        return
    for name in names:
        yield
        yield from sweep_home(os.path.join(base, name))


def sweep_home(home: str, everyone: bool = False) -> Iterator[None]:
    """The same for one home. `everyone`: also what other users' owners have left."""
    if os.path.islink(home):  # a short way to a home's socket
        if not os.path.exists(home) and os.lstat(home).st_uid == os.getuid():
            _quietly(lambda: os.unlink(home))
        return
    try:
        lease = os.open(os.path.join(home, LEASE), os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield from _sweep_half_made(home)
        return
    except OSError:
        return
    try:
        if os.fstat(lease).st_uid != os.getuid() and not everyone:
            return
        try:
            fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # its owner lives
        keep = os.read(lease, len(KEEP)) == KEEP
        clear_crashed(os.path.join(home, DATA))
        if keep:
            _quietly(lambda: os.unlink(os.path.join(home, LEASE)))
        else:
            yield from removal(home)
    finally:
        os.close(lease)


def is_half_made(home: str) -> bool:
    """Whether a directory without a lease is one that nobody makes or removes any more.

    What was set aside never is kept. Other directories may have such a name (a kept home, the
    folder of failed tests, a cache), but there is something in them.
    """
    try:
        old = time.time() - os.lstat(home).st_mtime > HALF_MADE
        return home.endswith(ASIDE) or (old and set(os.listdir(home)) <= {LEASE + NEW})
    except OSError:
        return False


def _sweep_half_made(home: str) -> Iterator[None]:
    try:
        uid = os.lstat(home).st_uid
    except OSError:
        return
    # What was set aside is the server's user's, where root runs it.
    mine = uid == os.getuid() or (os.getuid() == 0 and home.endswith(ASIDE))
    if mine and is_half_made(home):
        yield from removal(home)
