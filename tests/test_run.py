"""`pgtemp run` and `pgtemp shell`: a server for one command, which is otherwise not affected."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from support import eventually, homes, run_pgtemp

PGTEMP = [sys.executable, "-m", "pgtemp"]
VARIABLES = ("DATABASE_URL", "PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGDATABASE")


def test_a_command_finds_its_server() -> None:
    """By the URL and by libpq's variables. The server is removed afterwards."""
    before = homes()
    script = (
        "import os, psycopg\n"
        "a = psycopg.connect(os.environ['DATABASE_URL']).info.dsn\n"
        "assert a == psycopg.connect('').info.dsn\n"
        f"print(*[os.environ[name] for name in {VARIABLES!r}], sep='\\n')"
    )
    unrelated = {"PGSSLMODE": "verify-full", "PGHOSTADDR": "192.0.2.1", "PGSERVICE": "nowhere"}
    result = run_pgtemp(
        *("run", "--dbname", "shop", "--user", "me", "--"),
        *(sys.executable, "-W", "ignore", "-c", script),
        env=unrelated,
    )
    assert result.returncode == 0, result.stderr
    url, _, port, user, password, dbname = result.stdout.split()
    assert url == f"postgresql://me:{password}@127.0.0.1:{port}/shop"
    assert (user, dbname) == ("me", "shop")
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(url)
    assert eventually(lambda: homes() <= before)


def test_output_and_status_of_the_command_are_unchanged() -> None:
    result = run_pgtemp("run", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (result.returncode, result.stdout, result.stderr) == (7, "out\n", "err\n")


def test_a_loaded_dump(tmp_path: Path) -> None:
    (tmp_path / "schema.sql").write_text("CREATE TABLE account (id int);")
    dump = str(tmp_path / "schema.sql")
    result = run_pgtemp("shell", "--load-from", dump, "--", "-Atc", "SELECT count(*) FROM account")
    assert (result.returncode, result.stdout) == (0, "0\n")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["no-such-command"], 127, "command 'no-such-command' not found"),
        (["/etc/passwd"], 126, "cannot be run: Permission denied"),
        ([], 2, "Missing argument"),
    ],
)
def test_a_command_that_cannot_run(words: list[str], status: int, message: str) -> None:
    result = run_pgtemp("run", "--", *words)
    assert result.returncode == status
    assert message in result.stderr
    assert "Traceback" not in result.stderr


_REPORTS_SIGNALS = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: (print("got", number, flush=True), sys.exit(9)))
print("ready", flush=True)
while True:
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_the_command(number: signal.Signals) -> None:
    """There is no terminal, which would send it to both processes."""
    before = homes()
    process = subprocess.Popen(
        [*PGTEMP, "run", "--", sys.executable, "-c", _REPORTS_SIGNALS],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"got {int(number)}\n"
        assert process.wait(30) == 9
    assert eventually(lambda: homes() <= before)


def test_ctrl_c_reaches_the_command_once() -> None:
    """A terminal sends it to the command itself."""
    counts = (
        "import signal\n"
        "times = []\n"
        "signal.signal(signal.SIGINT, lambda *a: (times.append(1), print('caught', flush=True)))\n"
        "print('ready', flush=True)\n"
        "input()\n"
        "print('got', len(times), 'of them', flush=True)\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*PGTEMP, "run", "--", sys.executable, "-c", counts])
    output = b""
    try:
        for word, then in ((b"ready", b"\x03"), (b"caught", b"go on\n"), (b"of them", b"")):
            while word not in output:
                output += os.read(terminal, 1000)
            os.write(terminal, then)
    finally:
        os.waitpid(pid, 0)
        os.close(terminal)
    assert b"got 1 of them" in output


def test_pgtemp_exits_with_the_signal_of_a_killed_command() -> None:
    """A shell, make or tox then sees the signal."""
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV):
        assert run_pgtemp("run", "sh", "-c", f"kill -{int(number)} $$").returncode == -number


def test_killing_pgtemp_stops_the_server() -> None:
    before = homes()
    process = subprocess.Popen(
        [*PGTEMP, "run", "--", "sh", "-c", "echo $$; exec sleep 60"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout:
        sleeper = int(process.stdout.readline())
        process.kill()
        process.wait()
        os.kill(sleeper, signal.SIGKILL)
    assert eventually(lambda: homes() <= before)


def test_a_server_that_cannot_start_is_an_error() -> None:
    result = run_pgtemp("run", "--pg-version", "99", "--", "true")
    assert result.returncode == 2
    assert "99" in result.stderr
