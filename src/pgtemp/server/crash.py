"""What a killed server or program leaves running, and in the kernel; and ending it.

Shared by the warden's process, so it imports nothing that is slow and nothing of pgtemp. A process
is told by the directory it works in and by its user, never by a pid that was written down. Paths
are not trusted: whoever runs a server can put a link into its directory, and root comes by here.
"""

from __future__ import annotations

import _ctypes
import os
import stat
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIGKILL, SIGTERM = 9, 15
_SIGCONT = 19 if sys.platform == "darwin" else 18
# What was killed is not gone at once: a process disappears from /proc before its memory is let go.
_TRIES, _MOMENT = 200, 0.005
_PATIENCE = 1000  # moments that a program gets to clean up
IPC_RMID = 0
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# The C half, since `ctypes` itself takes 3 ms to import.
_libc = _ctypes.dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]


def libc(function: str, *arguments: int | None) -> int:
    """Call a function of the C library that Python has no name for; its result."""
    result: int = _ctypes.call_function(_ctypes.dlsym(_libc, function), arguments)
    return result


def quietly(do: Callable[[], object]) -> None:
    """Do something that may have been done already, or that is not ours to do."""
    try:
        do()
    except OSError:
        pass


def open_file(name: str, directory: int) -> int:
    """A descriptor of a plain file, for reading. Raises OSError where it is anything else."""
    file = os.open(name, _FILE, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FileNotFoundError(name)
    return file


def open_data(data_dir: str) -> int:
    """A descriptor of a data directory in a home; neither may be a link. Raises OSError."""
    home, name = os.path.split(data_dir)
    above = os.open(home, DIRECTORY)
    try:
        return os.open(name, DIRECTORY, dir_fd=above)
    finally:
        os.close(above)


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


def postgres_in(data_dir: str) -> list[int]:
    """Ids of the PostgreSQL processes that work in `data_dir`; none without /proc (macOS)."""
    try:
        data = open_data(data_dir)
    except OSError:
        return []
    try:
        return _working_in(data)
    finally:
        os.close(data)


def _working_in(data: int) -> list[int]:
    """Every server process has its data directory as working directory, and its owner as user."""
    here = os.fstat(data)
    found = []
    for pid, _ in all_postgres():
        try:
            there = os.stat(f"/proc/{pid}/cwd")
            uid = os.stat(f"/proc/{pid}").st_uid
        except OSError:
            continue
        if os.path.samestat(here, there) and uid == here.st_uid:
            found.append(pid)
    return found


def unblock(data_dir: str) -> None:
    """Let the processes that work in `data_dir` go on: continue those that are stopped, and kill
    programs that they run (COPY PROGRAM), for which a backend waits whatever signal it gets."""
    backends = set(postgres_in(data_dir))
    for pid in backends:
        quietly(lambda: os.kill(pid, _SIGCONT))  # noqa: B023 - called at once
    for name in os.listdir("/proc") if backends else ():
        # A backend leads a process group, in which its programs are.
        if name.isdigit() and int(name) not in backends and _group_of(int(name)) in backends:
            quietly(lambda: os.kill(int(name), SIGKILL))  # noqa: B023 - called at once


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:
        return 0


def clear_crashed(data_dir: str, postmaster: int = 0) -> None:
    """End what a killed postmaster left running in `data_dir`, and its SysV segment.

    Args:
        postmaster: its id, by which its segment is told even if its notes are lost.
    """
    try:
        data = open_data(data_dir)
    except OSError:
        return
    try:
        clear(data, postmaster)
    finally:
        os.close(data)


def clear(data: int, postmaster: int = 0) -> None:
    """The same, for the descriptor of a data directory."""
    killed: set[int] = {postmaster} if postmaster else set()
    for _ in range(_TRIES):
        orphans = _working_in(data)
        for pid in orphans:
            quietly(lambda: os.kill(pid, SIGKILL))  # noqa: B023 - called at once
        if not orphans:
            break
        killed.update(orphans)
        time.sleep(_MOMENT)
    # Only now: a server that was killed while it started may have noted it a moment ago, and one
    # that ended by itself has let go of its memory before its notes.
    noted, uid = _segment_of(data), os.fstat(data).st_uid
    for _ in range(_TRIES if noted or killed else 0):
        if _segments_removed(noted, killed, uid):
            break
        time.sleep(_MOMENT)


def _segment_of(data: int) -> tuple[int, int] | None:
    """Key and id of the shared memory that a server has noted."""
    try:
        file = open_file("postmaster.pid", data)
        try:
            key, shmid = os.read(file, 4096).split(b"\n")[6].split()
            return int(key), int(shmid)
        finally:
            os.close(file)
    except (OSError, IndexError, ValueError):
        return None


def _segments_removed(noted: tuple[int, int] | None, makers: set[int], uid: int) -> bool:
    """Remove the shared memory that a server had noted, or had made and not noted yet, if it is
    still that user's; False while somebody has it."""
    try:
        with open("/proc/sysvipc/shm") as table:
            rows = [[int(field) for field in line.split()] for line in list(table)[1:]]
    except OSError:
        return True
    gone = True
    for key, shmid, _, _, maker, _, attached, owner, *_ in rows:
        if owner == uid and ((key, shmid) == noted or maker in makers):
            if attached:
                gone = False
            else:
                libc("shmctl", shmid, IPC_RMID, None)
    return gone


def end_group(leader: int, gently: bool) -> Iterator[None]:
    """End a program that is not our child, with all in its process group; a moment a step.

    Args:
        gently: let it end by itself at first, and clean up.
    """
    if gently:
        quietly(lambda: os.kill(leader, SIGTERM))
        for _ in range(_PATIENCE):
            try:
                os.killpg(leader, 0)
            except OSError:
                return
            yield
            time.sleep(_MOMENT)
    quietly(lambda: os.killpg(leader, SIGKILL))
    yield
