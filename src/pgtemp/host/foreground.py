"""Run a command in place of this process: on its terminal, with the signals that it receives."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress

_FORWARDED = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)


def run(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a command; return its exit status, or the negated number of the signal that ended it.

    Raises OSError if the command cannot be run.

    Args:
        env: the complete environment of the command.
    """
    # posix_spawnp reports "permission denied" if a directory in PATH is not accessible.
    if os.path.dirname(argv[0]) == "" and shutil.which(argv[0]) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])
    early: list[int] = []
    pid = 0

    def forward(number: int, frame: object) -> None:
        if not pid:
            early.append(number)
        elif number not in _FROM_TERMINAL or not _is_on_terminal():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    # A signal that is ignored (as under nohup) stays ignored, and the command also ignores it.
    handled = [one for one in _FORWARDED if signal.getsignal(one) != signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in handled}
    try:
        # Python ignores the last two by default.
        reset = [*handled, signal.SIGPIPE, signal.SIGXFSZ]
        pid = os.posix_spawnp(argv[0], list(argv), env, setsigdef=reset)
        for number in early:
            os.kill(pid, number)
        return _wait(pid)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(pid: int) -> int:
    """Wait for a command to exit; if it is stopped, stop too, so that the shell notices."""
    while True:
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.kill(pid, signal.SIGCONT)


def _is_on_terminal() -> bool:
    """Whether the terminal sends its signals to this process group, child processes included."""
    try:
        with open("/dev/tty", "rb", buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
