"""Behaviour as process 1 of a container: forward signals, and reap orphaned processes.

The kernel makes process 1 the parent of every orphan, and delivers to it only signals for which it
has a handler. pgtemp's work runs in a child process, so the other modules need no special case.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def run(work: Callable[[], int]) -> int:
    """Do the work, in a child process if this is process 1; return its exit status.

    The caller must not have started a thread or a process yet. If a signal terminates the work, the
    status is 128 plus the signal's number, as in a shell.
    """
    if os.getpid() != 1:
        return work()
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until the child exists
    child = os.fork()
    if child == 0:
        _lead()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        return work()
    for number in _PASSED_ON:
        signal.signal(number, lambda got, _: _pass_on(child, got))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _pass_on(child: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has just exited
        os.kill(child, number)


def _lead() -> None:
    """Create a process group; make it the terminal's foreground group if process 1's group was.

    A terminal signals a whole group, so in process 1's group the child would get each Ctrl-C twice.
    """
    before = os.getpgrp()
    os.setpgid(0, 0)
    with suppress(OSError), open("/dev/tty", "rb", buffering=0) as terminal:
        if os.tcgetpgrp(terminal.fileno()) == before:
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # else tcsetpgrp stops us
            os.tcsetpgrp(terminal.fileno(), os.getpgrp())
            signal.signal(signal.SIGTTOU, signal.SIG_DFL)
