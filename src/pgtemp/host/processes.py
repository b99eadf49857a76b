"""Run programs. No other module does, except that the supervisor process starts postmasters.

Programs get a clean environment, so that a PGHOST, LC_ALL or TZ in the caller's environment has no
effect. Their output does not reach the caller's terminal.
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

# Variables that a program may need to find its libraries or its user; no others are passed on.
_PASSED_ON = ("LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "TMPDIR", "HOME")
# Variables that would make libpq, and the commands that pgtemp runs, connect to another server or
# require features that pgtemp's servers lack.
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
    """The environment for PostgreSQL's programs: UTF-8, English messages, no libpq variables."""
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
    """Run a program, wait for it, and return its exit status and its output.

    Args:
        argv: the program's path and its arguments; never a password.
        identity: the user to run it as; None is the caller.
        env: added to the clean environment.
        stdin: the text for its standard input.
        cwd: its working directory.
        guard: called with its pid, and with 0 when it has exited; the program then leads a process
            group of its own.
        seconds: the time limit.
        output: a descriptor for its standard output; by default the output is returned.

    Raises:
        OSError: the program could not be run.
        subprocess.TimeoutExpired: it exceeded the time limit, and was killed.
        PgTempError: this process is about to exit.
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
    """Run a user's shell command as the caller, and wait for it.

    The command also finds programs of the current virtual environment if that is not activated.

    Args:
        env: added to the caller's own environment.
        cwd: its working directory.
        guard: called with its pid, which is also its process group, and with 0 when it has exited.

    Returns:
        Its exit status, and its standard output and standard error together, in `stdout`.
    """
    _check_going_on()
    inherited = {name: text for name, text in os.environ.items() if name not in LEADS_ELSEWHERE}
    places = [os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)]
    with tempfile.TemporaryFile() as output:  # background processes would hold a pipe open
        process = subprocess.Popen(
            _waiting(["/bin/sh", "-c", command]),
            env={**inherited, "PATH": os.pathsep.join(places), **env},
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,  # so that processes started by the command can be killed with it
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
        text = output.read().decode("utf-8", "replace")
    return subprocess.CompletedProcess(process.args, process.returncode, text)


def _end_gently(process: subprocess.Popen[bytes]) -> None:
    """Terminate the leader of a process group, let it clean up, then kill the rest of the group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


_GO = "\n"


def _waiting(argv: Sequence[str]) -> list[str]:
    """Arguments that run a program once it reads `_GO`, and never if this process exits first."""
    return ["/bin/sh", "-c", 'read -r go && exec "$0" "$@"', *argv]


def run_on(terminal: IO[bytes], argv: Sequence[str | Path]) -> None:
    """Run an interactive program on a terminal, with the caller's environment, and wait for it."""
    subprocess.run(argv, stdin=terminal, stdout=terminal, stderr=terminal, check=False)


def run_in_foreground(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a command in place of this process: on its terminal, with the signals it receives.

    Args:
        env: the complete environment of the command.

    Returns:
        Its exit status; if negative, the signal that terminated it.

    Raises:
        OSError: the command cannot be run.
    """
    # posix_spawnp reports "permission denied" if a directory in PATH is not accessible.
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

    # A signal that is ignored (as under nohup) stays ignored, for the command too.
    handled = [one for one in _PASSED_TO_COMMANDS if signal.getsignal(one) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in handled}
    try:
        # Python sets the last two to be ignored.
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


_running: set[subprocess.Popen[Any]] = set()
_interrupted = threading.Event()


def interrupt() -> None:
    """Terminate the running programs and start no others: this process is about to exit."""
    _interrupted.set()
    for process in list(_running):
        _signal_all(process, signal.SIGTERM)


def _check_going_on() -> None:
    if _interrupted.is_set():
        raise PgTempError("interrupted")


def _signal_all(process: subprocess.Popen[Any], number: int) -> None:
    """Signal a program; if it leads a process group, signal the whole group."""
    try:
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    except ProcessLookupError:
        pass


def start_detached(argv: Sequence[str], *, stdin: int) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, so that the terminal's Ctrl-C does not reach it.

    Args:
        stdin: the descriptor that becomes its standard input. Inheriting it under its own number
            instead would fail: if the caller's standard streams are closed, it may have the number
            of one of them.
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
