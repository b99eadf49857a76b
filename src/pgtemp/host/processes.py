"""The only place that runs programs (but for the postmaster, which the warden's process starts).

Programs get a clean environment, so that a stray PGHOST, LC_ALL or TZ of the caller changes
nothing, and nothing of what they print reaches the caller's terminal.
"""

from __future__ import annotations

import errno
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from pgtemp.errors import PgTempError
from pgtemp.host.identity import Identity

# What may decide whether a program finds its libraries or its user; the rest is not passed on.
_PASSED_ON = ("LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "TMPDIR", "HOME")
# What would lead libpq, and the commands that we run, to another server, or ask of ours what it
# has not.
LEADS_ELSEWHERE = (
    "PGHOSTADDR", "PGSERVICE", "PGSERVICEFILE", "PGPASSFILE", "PGSSLMODE", "PGREQUIRESSL",
    "PGSSLNEGOTIATION", "PGGSSENCMODE", "PGREQUIREAUTH", "PGCHANNELBINDING",
    "PGTARGETSESSIONATTRS", "PGLOADBALANCEHOSTS",
)  # fmt: skip
_PASSED_TO_COMMANDS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
_END_SECONDS = 5.0
_MOST_OUTPUT = 1 << 20  # bytes of a program of another user; initdb prints 2 KB
_PASSED_ON_PREFIX = "NSS_WRAPPER_"


def clean_environment() -> dict[str, str]:
    """The environment for PostgreSQL's programs: UTF-8, English messages, nothing of libpq's."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIX)
    }
    env["PATH"] = "/usr/local/bin:/usr/bin:/bin"
    env["PGPASSFILE"] = os.devnull  # a server that asks for a password gets none of the caller's
    # A valid LC_ALL also keeps macOS from making the postmaster multithreaded.
    env["LC_ALL"] = "C.UTF-8" if sys.platform == "linux" else "en_US.UTF-8"
    return env


def run(
    argv: Sequence[str | Path],
    *,
    identity: Identity | None = None,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    cwd: str | Path = "/",
    guard: Callable[[int], None] | None = None,
    seconds: float | None = None,
    output: int = subprocess.PIPE,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return its exit status and what it printed.

    Args:
        argv: the program's path and its arguments; never a password.
        identity: whom to run it as; None is the caller.
        env: added to the clean environment.
        stdin: what it reads.
        cwd: the directory it works in.
        guard: called with its id, and with 0 when it has ended; it leads a process group then.
        seconds: how long it may take.
        output: a descriptor that its standard output goes to; by default it is returned.

    Raises:
        OSError: the program could not be run.
        subprocess.TimeoutExpired: it took longer than it may; it was killed.
        PgTempError: this process is about to end.
    """
    _check_going_on()
    become = identity if identity is not None and identity.switch else None
    words = [os.fspath(part) for part in argv]
    with subprocess.Popen(
        words if guard is None else _waiting(words),
        env={**clean_environment(), **(env or {})},
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.PIPE,
        cwd=cwd,
        umask=0o077,
        process_group=0 if guard is not None and become is None else None,
        # Its user can control it, and would reach the caller's terminal.
        start_new_session=become is not None,
        user=become.uid if become else None,
        group=become.gid if become else None,
        extra_groups=[] if become else None,
    ) as process:
        _running.add(process)
        try:
            if guard is not None:
                guard(process.pid)
                stdin = _GO + stdin
            said = _communicate(process, stdin, seconds, _MOST_OUTPUT if become else None)
        except BaseException:
            if guard is not None:
                _end_gently(process)
            process.kill()
            raise
        finally:
            _running.discard(process)
            if guard is not None:
                guard(0)
    stdout, stderr = (data.decode("utf-8", "replace") for data in said)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def _communicate(
    process: subprocess.Popen[bytes], stdin: str, seconds: float | None, most: int | None
) -> tuple[bytes, bytes]:
    """As `Popen.communicate`; a program that prints more than so many bytes is killed.

    A program of another user may be controlled by that user, who could fill the caller's memory.
    """
    if most is None:
        stdout, stderr = process.communicate(stdin.encode(), seconds)
        return stdout or b"", stderr or b""
    deadline = None if seconds is None else time.monotonic() + seconds
    said: dict[int, bytearray] = {}
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(stdin.encode())
        process.stdin.close()
    with selectors.DefaultSelector() as reading:
        pipes = [pipe for pipe in (process.stdout, process.stderr) if pipe is not None]
        for pipe in pipes:
            said[pipe.fileno()] = bytearray()
            reading.register(pipe, selectors.EVENT_READ)
        while reading.get_map():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(process.args, seconds or 0)
            for key, _ in reading.select(left):
                data = os.read(key.fd, 1 << 16)
                said[key.fd] += data
                if not data or len(said[key.fd]) > most:
                    reading.unregister(key.fileobj)
                if len(said[key.fd]) > most:
                    process.kill()
    process.wait(None if deadline is None else max(0.1, deadline - time.monotonic()))
    found = [bytes(said[pipe.fileno()]) for pipe in pipes]
    return found[0] if process.stdout is not None else b"", found[-1]


def run_command(
    command: str, env: Mapping[str, str], cwd: str, guard: Callable[[int], None]
) -> subprocess.CompletedProcess[str]:
    """Run a user's shell command to its end, as the caller.

    Programs of our own virtual environment are found too, where it was not activated.

    Args:
        env: added to the caller's own environment.
        cwd: the directory it works in.
        guard: called with its id, which is that of its process group too, and with 0 at its end.

    Returns:
        Its exit status, and what it printed on both its outputs, in `stdout`.
    """
    _check_going_on()
    inherited = {name: text for name, text in os.environ.items() if name not in LEADS_ELSEWHERE}
    places = [os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)]
    with tempfile.TemporaryFile() as output:  # a pipe would last as long as what runs on behind
        process = subprocess.Popen(
            _waiting(["/bin/sh", "-c", command]),
            env={**inherited, "PATH": os.pathsep.join(places), **env},
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,  # so that what the command has started can be ended with it
        )
        _running.add(process)
        try:
            guard(process.pid)
            process.communicate(_GO)
        finally:
            _running.discard(process)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            guard(0)
        output.seek(0)
        said = output.read().decode("utf-8", "replace")
    return subprocess.CompletedProcess(process.args, process.returncode, said)


def _end_gently(process: subprocess.Popen[bytes]) -> None:
    """Let a program that leads its group clean up, then end what is left of the group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


_GO = "\n"


def _waiting(argv: Sequence[str]) -> list[str]:
    """A program that begins when it is told to, and never if we are gone before that."""
    return ["/bin/sh", "-c", 'read -r go && exec "$0" "$@"', *argv]


def run_on(terminal: IO[bytes], argv: Sequence[str | Path]) -> None:
    """Run a program that talks to the user, to its end, with the caller's environment."""
    subprocess.run(argv, stdin=terminal, stdout=terminal, stderr=terminal, check=False)


def run_in_foreground(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a command in our place: on the terminal, with the signals that we get.

    Args:
        env: its whole environment.

    Returns:
        Its exit status; below zero, the signal that ended it.

    Raises:
        OSError: it cannot be run.
    """
    # posix_spawnp says "permission denied" where a directory of PATH is closed to us.
    if os.path.dirname(argv[0]) == "" and shutil.which(argv[0]) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])
    early: list[int] = []
    pid = 0

    def pass_on(number: int, frame: object) -> None:
        if not pid:
            early.append(number)
        elif number not in _FROM_TERMINAL or not _is_on_terminal():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    # What is ignored (nohup does that) stays ignored, for the command too.
    heard = [one for one in _PASSED_TO_COMMANDS if signal.getsignal(one) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in heard}
    try:
        # Python ignores the last two, for itself.
        reset = [*heard, signal.SIGPIPE, signal.SIGXFSZ]
        pid = os.posix_spawnp(argv[0], list(argv), env, setsigdef=reset)
        for number in early:
            os.kill(pid, number)
        return _wait(pid)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(pid: int) -> int:
    """Wait for a command to end; where it is stopped, stop too, so that the shell notices."""
    while True:
        _, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.kill(pid, signal.SIGCONT)


def _is_on_terminal() -> bool:
    """Whether the terminal sends its signals to us and to what we have started alike."""
    try:
        with open("/dev/tty", "rb", buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


_running: set[subprocess.Popen[Any]] = set()
_interrupted = threading.Event()


def interrupt() -> None:
    """End the programs that run, and let no other begin: this process is about to end."""
    _interrupted.set()
    for process in list(_running):
        _signal_all(process, signal.SIGTERM)


def _check_going_on() -> None:
    if _interrupted.is_set():
        raise PgTempError("interrupted")


def _signal_all(process: subprocess.Popen[Any], number: int) -> None:
    """Signal a program, and what it has started where it leads a process group of its own."""
    try:
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    except ProcessLookupError:
        pass


def start_detached(argv: Sequence[str], *, stdin: int) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, out of reach of the terminal's Ctrl-C.

    Args:
        stdin: the descriptor it gets as its standard input. A number that was passed on instead
            would not do: where the caller's own are closed, it may be that of one of them.
    """
    return subprocess.Popen(
        argv,
        env={},
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        close_fds=True,
        cwd="/",
    )
