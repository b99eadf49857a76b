"""As process 1 of a container: pass signals on, and reap whatever loses its parent.

The kernel makes process 1 the parent of every orphan, and gives it no signal that it does not
listen to. What pgtemp does goes on in a child, so that nothing there need know of this.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        return work()
    for number in _PASSED_ON:
        signal.signal(number, lambda got, _: os.kill(child, got))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
