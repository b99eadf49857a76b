"""As process 1 of a container: pass signals on, and reap whatever loses its parent.

The kernel makes process 1 the parent of every orphan, and gives it no signal that it does not
listen to. What pgtemp does goes on in a child, so that nothing there need know of this.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def run(work: Callable[[], int]) -> int:
    """Do the work, in a child where this is process 1; its exit status.

    Nothing may have been started yet, threads included. Where the work is ended by a signal, the
    status is that of a shell, 128 and the signal.
    """
    if os.getpid() != 1:
        return work()
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)  # until there is somebody to have them
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
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(child, number)


def _lead() -> None:
    """Be a process group of one's own, and the terminal's where process 1 was that.

    A terminal signals whole groups, so that the child would have each Ctrl-C twice.
    """
    before = os.getpgrp()
    os.setpgid(0, 0)
    with suppress(OSError), open("/dev/tty", "rb", buffering=0) as terminal:
        if os.tcgetpgrp(terminal.fileno()) == before:
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it would stop whoever is not yet in it
            os.tcsetpgrp(terminal.fileno(), os.getpgrp())
            signal.signal(signal.SIGTTOU, signal.SIG_DFL)
