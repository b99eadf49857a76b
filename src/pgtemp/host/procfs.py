"""Information that the kernel publishes in /proc, mostly about one process.

The supervisor process imports this module, so it imports no module that is slow to import.
"""

from __future__ import annotations

import os

_LONGEST = 2048  # bytes of a command line


def read(name: str, limit: int = -1) -> bytes:
    """The first bytes of a file in /proc; b"" if there is none, as if the process has exited."""
    try:
        with open(f"/proc/{name}", "rb") as file:
            return file.read(limit)
    except OSError:
        return b""


def lines(name: str) -> list[str]:
    """The lines of a file in /proc; none if there is no such file.

    Only a line feed ends a line: the kernel escapes no other character in a name that a user chose.
    """
    return [line for line in read(name).decode("utf-8", "replace").split("\n") if line]


def lives(pid: int) -> bool:
    """Whether a process with that pid exists, whichever user it belongs to."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _stat(pid: int) -> list[bytes]:
    """The fields of stat after the program's name, which may contain any character."""
    return read(f"{pid}/stat").rpartition(b") ")[2].split()


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal such as SIGSTOP; False if that is unknown."""
    return _stat(pid)[:1] == [b"T"]


def started(pid: int) -> int:
    """When a process was started, in ticks since boot; together with the pid this identifies it.

    0 if that is unknown: the process has exited, or there is no /proc (macOS).
    """
    fields = _stat(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def age(pid: int) -> float | None:
    """Seconds since a process was started; None if that is unknown."""
    ticks, uptime = started(pid), read("uptime").split()
    if not ticks or not uptime:
        return None
    # Not below zero: a container may have an uptime of its own.
    return max(0.0, float(uptime[0]) - ticks / os.sysconf("SC_CLK_TCK"))


def command(pid: int) -> str:
    """The command line of a process, in one line; "" if that is unknown.

    A process can set a command line of any length. A long one is cut after a complete argument, so
    that no part of a URL is shown in which the password could not be recognized.
    """
    words = read(f"{pid}/cmdline", _LONGEST + 1)
    if len(words) > _LONGEST:
        words = words.rpartition(b"\0")[0] + b"\0..."
    return " ".join(words.replace(b"\0", b" ").decode("utf-8", "replace").split())
