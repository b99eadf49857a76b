"""Clean up after a killed server or program: its remaining processes and its shared memory.

The supervisor process imports this module, so it imports no module that is slow to import.

A process is identified by its working directory and its user, never by a recorded pid. Paths are
not trusted: the server user can put a link into its directory, and root removes that directory.
"""

from __future__ import annotations

import _ctypes
import os
import sys
import time

from pgtemp.host import procfs
from pgtemp.host.openat import DIRECTORY, Closing, open_file, quietly

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable, Iterator
else:
    import _signal

SIGKILL, SIGTERM = 9, 15
_SIGCONT = 19 if sys.platform == "darwin" else 18
# Killing takes effect with a delay: a process disappears from /proc before its memory is released.
# A client can start processes as fast as they are killed, so each part of the cleanup has a limit.
_SECONDS, _PAUSE = 1.0, 0.005
_CLEANUP_PAUSES = 1000  # how long a program may take to clean up
IPC_RMID = 0
# The C extension module, because `ctypes` itself takes 3 ms to import.
_libc = _ctypes.dlopen(None, os.RTLD_NOW)  # type: ignore[arg-type]


def libc(function: str, *arguments: int | None) -> int:
    """Call a function of the C library that Python does not provide; return its result."""
    result: int = _ctypes.call_function(_ctypes.dlsym(_libc, function), arguments)
    return result


def open_data(data_dir: str) -> int:
    """Open the data directory in a run directory; neither may be a link. Raises OSError."""
    run_dir, name = os.path.split(data_dir)
    with Closing(os.open(run_dir, DIRECTORY)) as above:
        return os.open(name, DIRECTORY, dir_fd=above)


def all_postgres() -> Iterator[tuple[int, str]]:
    """Every PostgreSQL server process that this user may inspect, with its working directory.

    PostgreSQL runs only as the owner of its data directory. A process of another user in that
    directory is not a server, whatever the name of its program.
    """
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            try:
                cwd = os.readlink(f"/proc/{name}/cwd")
                program = os.readlink(f"/proc/{name}/exe")
                owner = os.stat(f"/proc/{name}/cwd").st_uid
                if os.path.basename(program).startswith("postgres") and (
                    os.stat(f"/proc/{name}").st_uid == owner
                ):
                    yield int(name), cwd
            except OSError:
                continue


def postgres_in(data_dir: str) -> list[int]:
    """The pids of the PostgreSQL processes that work in `data_dir`; none without /proc (macOS)."""
    try:
        data = open_data(data_dir)
    except OSError:
        return []
    with Closing(data):
        return _working_in(data)


def _working_in(data: int) -> list[int]:
    return [pid for pid, _ in all_postgres() if _works_in(data, pid)]


def _works_in(data: int, pid: int) -> bool:
    """Whether a process works in `data` and runs as the user who owns it."""
    try:
        here, there = os.fstat(data), os.stat(f"/proc/{pid}/cwd")
        return os.path.samestat(here, there) and os.stat(f"/proc/{pid}").st_uid == here.st_uid
    except OSError:
        return False


def _signal_one(pid: int, number: int, is_meant: Callable[[int], bool]) -> None:
    """Send a signal to a process if it is still the intended process.

    The search takes a while if there are many processes, and another process may have the pid by
    now. The function therefore opens a descriptor of the process first, and checks it afterwards.
    """
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # a system without pidfd
        quietly(os.kill, pid, number)
        return
    with Closing(process):
        if is_meant(pid):
            quietly(_signal.pidfd_send_signal, process, number)


def _kill(data: int, pid: int) -> None:
    """Kill a server process of `data`."""
    _signal_one(pid, SIGKILL, lambda pid: _works_in(data, pid))


def unblock(data_dir: str) -> None:
    """Enable the server in `data_dir` to react to signals.

    Continues its stopped processes, and kills programs that its backends run (COPY PROGRAM): a
    backend waits for its program, whatever signal it receives.
    """
    try:
        data = open_data(data_dir)
    except OSError:
        return
    with Closing(data):
        uid, before = os.fstat(data).st_uid, _processes()
        # After `before`, so that a backend that is in both is recognized as one.
        found = set(_working_in(data))
        for pid in found:
            _signal_one(pid, _SIGCONT, lambda pid: _works_in(data, pid))
        # Backends are children of the postmaster. A program may also be called postgres.
        parents = {pid: parent for pid, (parent, _) in before.items()}
        first = {pid for pid in found if parents.get(pid) not in found}
        servers = {pid for pid in found if pid in first or parents.get(pid) in first}
        pipes = _pipes_of(servers - first) - _pipes_of(first)
        programs = _descendants(servers, parents)
        # Children first: a process is identified by its parent.
        for pid in reversed(programs):
            _signal_one(pid, SIGKILL, lambda pid: _process(pid) == (parents[pid], uid))
        for pid in before.keys() - servers if servers else ():
            if _belongs_to(pid, servers, pipes, uid):
                _signal_one(pid, SIGKILL, lambda pid: _belongs_to(pid, servers, pipes, uid))


def _process(pid: int) -> tuple[int, int] | None:
    """The parent and the user of a process; /proc may report root as the user (proc(5))."""
    fields = dict(line.split(":", 1) for line in procfs.lines(f"{pid}/status") if ":" in line)
    try:
        return int(fields["PPid"]), int(fields["Uid"].split()[1])
    except (KeyError, ValueError):
        return None


def _processes() -> dict[int, tuple[int, int]]:
    """The parent and the user of each process."""
    names = os.listdir("/proc") if os.path.isdir("/proc/self") else ()
    found = ((int(name), _process(int(name))) for name in names if name.isdigit())
    return {pid: process for pid, process in found if process is not None}


def _descendants(servers: set[int], parents: dict[int, int]) -> list[int]:
    """The processes that server processes have started, directly or indirectly."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        if pid not in servers:
            children.setdefault(parent, []).append(pid)
    found = list(servers)
    for pid in found:
        found += children.pop(pid, ())
    return found[len(servers) :]


def _pipes_of(pids: set[int]) -> set[str]:
    """The pipes that are open in some processes."""
    found = set()
    for pid in pids:
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
        except OSError:
            continue
    return {one for one in found if one.startswith("pipe:")}


def _belongs_to(pid: int, groups: set[int], pipes: set[str], uid: int) -> bool:
    """Whether a process of a user is in one of the process groups, or has one of the pipes open.

    A backend leads a process group that contains its programs; and it waits for the process that
    holds the other end of its pipe, even if the program that started this process has exited.
    """
    process = _process(pid)
    if process is None or process[1] != uid:
        return False
    try:
        return os.getpgid(pid) in groups or not pipes.isdisjoint(_pipes_of({pid}))
    except OSError:
        return False


def clear_crashed(data_dir: str, postmaster: int = 0) -> None:
    """Kill the processes that a killed postmaster left in `data_dir`, and remove its SysV segment.

    Args:
        postmaster: its pid, which identifies the segment even if postmaster.pid is lost.
    """
    try:
        data = open_data(data_dir)
    except OSError:
        return
    with Closing(data):
        clear(data, postmaster)


def clear(data: int, postmaster: int = 0) -> None:
    """Like `clear_crashed`, for the descriptor of a data directory."""
    killed: set[int] = {postmaster} if postmaster else set()
    deadline = time.monotonic() + _SECONDS
    while orphans := _working_in(data):
        for pid in orphans:
            _kill(data, pid)
        killed.update(orphans)
        if time.monotonic() >= deadline:
            break
        time.sleep(_PAUSE)
    # Read this only after the processes have exited: a server that was killed during its start may
    # have recorded the segment immediately before, and a server that exits normally removes its
    # segment before postmaster.pid.
    recorded, uid = _segment_of(data), os.fstat(data).st_uid
    deadline = time.monotonic() + _SECONDS
    while (recorded or killed) and not _segments_removed(recorded, killed, uid):
        if time.monotonic() >= deadline:
            break
        time.sleep(_PAUSE)


def _segment_of(data: int) -> tuple[int, int] | None:
    """The key and the id of the shared memory segment that postmaster.pid records."""
    try:
        with Closing(open_file("postmaster.pid", data)) as file:
            key, shmid = os.read(file, 4096).split(b"\n")[6].split()
            return int(key), int(shmid)
    except (OSError, IndexError, ValueError):
        return None


def _segments_removed(recorded: tuple[int, int] | None, creators: set[int], uid: int) -> bool:
    """Remove the user's segments that a server recorded, or created without recording them yet.

    False while a process is still attached to one of them.
    """
    rows = ([int(field) for field in line.split()] for line in procfs.lines("sysvipc/shm")[1:])
    removed = True
    for key, shmid, _, _, creator, _, attached, owner, *_ in rows:
        if owner == uid and ((key, shmid) == recorded or creator in creators):
            if attached:
                removed = False
            else:
                libc("shmctl", shmid, IPC_RMID, None)
    return removed


def end_group(leader: int, gently: bool) -> Iterator[None]:
    """Stop, in short steps, the process group of a program that is not a child process.

    Args:
        gently: first send SIGTERM to its leader and give it time to clean up.
    """
    if gently:
        quietly(os.kill, leader, SIGTERM)
        for _ in range(_CLEANUP_PAUSES):
            try:
                os.killpg(leader, 0)
            except OSError:
                return
            yield
            time.sleep(_PAUSE)
    quietly(os.killpg, leader, SIGKILL)
    yield
