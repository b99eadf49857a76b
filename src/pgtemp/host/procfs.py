"""Information about a process, looked up by its pid."""

from __future__ import annotations

import os

_LONGEST = 2048  # bytes of a command line


def lives(pid: int) -> bool:
    """Whether a process with that pid exists, whichever user it belongs to."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal such as SIGSTOP; False if that is unknown."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] == b"T"
    except OSError:
        return False


def started(pid: int) -> int:
    """When a process was started, in ticks since boot; together with the pid this identifies it.

    0 if that is unknown: the process has exited, or there is no /proc (macOS).
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The fields after the program's name, which may contain any character.
            return int(file.read().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def age(pid: int) -> float | None:
    """Seconds since a process was started; None if that is unknown."""
    ticks = started(pid)
    if not ticks:
        return None
    try:
        with open("/proc/uptime") as file:
            uptime = float(file.read().split()[0])
    except (OSError, ValueError):
        return None
    # Not below zero: a container may have an uptime of its own.
    return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))


def command(pid: int) -> str:
    """The command line of a process, in one line; "" if that is unknown.

    A process can set a command line of any length. A long one is cut after a complete argument, so
    that no part of a URL is shown in which the password could not be recognized.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(_LONGEST + 1)
    except OSError:
        return ""
    if len(words) > _LONGEST:
        words = words.rpartition(b"\0")[0] + b"\0..."
    return " ".join(words.replace(b"\0", b" ").decode("utf-8", "replace").split())
