"""What can be known of a process by its id."""

from __future__ import annotations

import os

_LONGEST = 2048  # bytes of a command line


def lives(pid: int) -> bool:
    """Whether there is a process of that id, whoever's it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal such as SIGSTOP; False where that cannot be told."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] == b"T"
    except OSError:
        return False


def started(pid: int) -> int:
    """When a process was started, in ticks since boot, which with its pid tells it from all others.

    0 where that cannot be told: it is gone, or there is no /proc (macOS).
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            # Behind the name, which may hold anything.
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def age(pid: int) -> float | None:
    """Seconds since a process was started; None where that cannot be told."""
    ticks = started(pid)
    if not ticks:
        return None
    try:
        with open("/proc/uptime") as file:
            uptime = float(file.read().split()[0])
    except (OSError, ValueError):
        return None
    return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))  # a container may have its own


def command(pid: int) -> str:
    """The command line of a process, in one line; "" where that cannot be told.

    A process may make its command line as long as it likes. A long one ends with a whole argument,
    so that half a URL, in which a password cannot be recognized, is not shown.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            said = file.read(_LONGEST + 1)
    except OSError:
        return ""
    if len(said) > _LONGEST:
        said = said.rpartition(b"\0")[0] + b"\0..."
    return " ".join(said.replace(b"\0", b" ").decode("utf-8", "replace").split())
