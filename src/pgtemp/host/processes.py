"""Run programs. No other module does, except foreground.py and the supervisor process.

Programs get a clean environment, so that a PGHOST, LC_ALL or TZ in the caller's environment has no
effect. Their output does not reach the caller's terminal.
"""

from __future__ import annotations

import math
import os
import selectors
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
_END_SECONDS = 5.0
_CHECK_SECONDS = 1.0
_OUTPUT_BYTES = 1 << 20  # the limit on the output of another user's program; initdb prints 2 KB
_PASSED_ON_PREFIX = "NSS_WRAPPER_"


def clean_environment() -> dict[str, str]:
    """The environment for PostgreSQL's programs: UTF-8, English messages, no libpq variables."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIX)
    }
    env["PATH"] = "/usr/local/bin:/usr/bin:/bin"
    # A server that asks for a password gets none of the caller's. libpq warns of a file that exists
    # but is not regular.
    env["PGPASSFILE"] = f"{os.devnull}/none"
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
    check: Callable[[], None] = lambda: None,
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
        output: a descriptor for the standard output of a program of the caller; by default the
            output is returned.
        check: called once a second; if it raises, a program of the caller is killed.

    Raises OSError if the program could not be run, subprocess.TimeoutExpired if it exceeded the
    time limit and was killed, and PgTempError if this process is about to exit.
    """
    _check_not_interrupted()
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
        # That user can control the program, and must not get access to the caller's terminal.
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
            if become:
                output_bytes = _communicate_limited(process, stdin.encode(), seconds)
            else:
                output_bytes = _communicate(process, stdin.encode(), seconds, check)
        except BaseException:
            if guard is not None:
                _end_gently(process)
            process.kill()
            raise
        finally:
            _running.discard(process)
            if guard is not None:
                guard(0)
    stdout, stderr = ((data or b"").decode("utf-8", "replace") for data in output_bytes)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def _communicate(
    process: subprocess.Popen[bytes],
    stdin: bytes,
    seconds: float | None,
    check: Callable[[], None],
) -> tuple[bytes, bytes]:
    """As `Popen.communicate`, and call `check` once a second."""
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    while True:
        remaining = deadline - time.monotonic()
        try:
            return process.communicate(stdin, min(_CHECK_SECONDS, max(remaining, 0)))
        except subprocess.TimeoutExpired:
            stdin = b""  # the next call sends the rest
            if remaining <= _CHECK_SECONDS:
                raise
            check()


def _communicate_limited(
    process: subprocess.Popen[bytes], stdin: bytes, seconds: float | None
) -> tuple[bytes, bytes]:
    """Like `Popen.communicate`, but kill a program that prints more than `_OUTPUT_BYTES`.

    A program of another user may be controlled by that user, who could fill the caller's memory.
    """
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    with suppress(BrokenPipeError):
        process.stdin.write(stdin)
        process.stdin.close()
    received = {pipe.fileno(): bytearray() for pipe in (process.stdout, process.stderr)}
    with selectors.DefaultSelector() as reading:
        for fd in received:
            reading.register(fd, selectors.EVENT_READ)
        while reading.get_map():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise subprocess.TimeoutExpired(process.args, seconds or 0)
            for key, _ in reading.select(None if seconds is None else remaining):
                data = os.read(key.fd, 1 << 16)
                received[key.fd] += data
                if not data or len(received[key.fd]) > _OUTPUT_BYTES:
                    reading.unregister(key.fd)
                if len(received[key.fd]) > _OUTPUT_BYTES:
                    process.kill()
    process.wait(None if seconds is None else max(0.1, deadline - time.monotonic()))
    stdout, stderr = received.values()
    return bytes(stdout), bytes(stderr)


def run_command(
    command: str, env: Mapping[str, str], cwd: str, guard: Callable[[int], None]
) -> subprocess.CompletedProcess[str]:
    """Run a user's shell command as the caller, and wait for it.

    The command also finds programs of the current virtual environment, even if it is not activated.

    Args:
        env: its complete environment.
        cwd: its working directory.
        guard: called with its pid, which is also its process group, and with 0 when it has exited.

    The result contains its standard output and standard error together, in `stdout`.
    """
    _check_not_interrupted()
    path = [env.get("PATH", os.defpath), os.path.dirname(sys.executable)]
    with tempfile.TemporaryFile() as output:  # background processes would hold a pipe open
        process = subprocess.Popen(
            _waiting(["/bin/sh", "-c", command]),
            env={**env, "PATH": os.pathsep.join(path)},
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
    """Wrap a command so that it waits for `_GO`; if this process exits first, it never runs."""
    return ["/bin/sh", "-c", 'read -r go && exec "$0" "$@"', *argv]


def run_on(terminal: IO[bytes], argv: Sequence[str | Path], env: Mapping[str, str]) -> None:
    """Run an interactive program on a terminal, and wait for it.

    Args:
        env: its complete environment.
    """
    subprocess.run(argv, stdin=terminal, stdout=terminal, stderr=terminal, env=env, check=False)


_running: set[subprocess.Popen[Any]] = set()
_interrupted = threading.Event()


def interrupt() -> None:
    """Terminate the running programs and start no others: this process is about to exit."""
    _interrupted.set()
    for process in list(_running):
        with suppress(ProcessLookupError):
            if os.getpgid(process.pid) == process.pid:  # it leads a process group
                os.killpg(process.pid, signal.SIGTERM)
            else:
                process.terminate()


def _check_not_interrupted() -> None:
    if _interrupted.is_set():
        raise PgTempError("interrupted")


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
