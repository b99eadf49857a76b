"""The example with PostgreSQL's own programs, each version with a daemon of the same version."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from pathlib import Path

import psycopg
import pytest

from clients.toolchain import copy_of, need, run
from pgtemp.host import identity
from pgtemp.programs import search
from pgtemp.programs.installation import Installation
from support import Daemon, eventually

pytestmark = pytest.mark.slow
PROGRAMS = ("psql", "pgbench", "pg_dump", "pg_restore", "pg_isready")


def bin_dir_of(version: str) -> Path:
    """The directory with all the programs of a version."""
    found = next(one for one in search.available() if str(one.major) == version)
    within = found.within_reach(identity.choose(None))
    for name in PROGRAMS:
        if not (within.bin_dir / name).exists():
            pytest.skip(f"{within.bin_dir} has no {name}")
    return within.bin_dir


def test_programs(any_version: str, daemon: type[Daemon], tmp_path: Path) -> None:
    """psql, pgbench, pg_dump and pg_restore, with one and several connections, and Ctrl-C."""
    need("bash")
    programs = bin_dir_of(any_version)
    example = copy_of("programs", tmp_path)
    template = f"app={example / 'migrations'}"
    served = daemon("--bin-dir", str(programs), "--template", template, dbname="app")
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    output = run("./check.sh", cwd=example, DATABASE_URL=served.uri, PATH=path)
    assert len(re.findall(r"^ok \d+ - ", output, re.M)) == 14
    assert output.endswith("1..14\n")


def test_ctrl_c_at_the_prompt(daemon: type[Daemon], programs: Installation) -> None:
    """A statement that is typed after a canceled one runs on the same connection."""
    need("setsid")
    uri = f"{daemon().uri}~typed"
    ours, theirs = pty.openpty()
    with (
        subprocess.Popen(
            ["setsid", "--ctty", programs.program("psql"), "-X", "-At", "--no-readline", uri],
            stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "PAGER": ""},
        ) as psql,
        # closed before the wait for psql: it sends a hangup
        open(ours, "r+b", buffering=0) as terminal,
        psycopg.connect(uri, autocommit=True) as other,
    ):  # fmt: skip
        os.close(theirs)
        terminal.write(b"CREATE TEMP TABLE mine (n int); SELECT pg_sleep(600);\n")
        sleeping = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event = 'PgSleep'"
        )
        assert eventually(lambda: other.execute(sleeping).fetchone() == (1,))
        terminal.write(b"\x03")
        assert eventually(lambda: other.execute(sleeping).fetchone() == (0,))
        terminal.write(b"SELECT 'found ' || 'mine' FROM pg_class WHERE relname = 'mine';\n\\q\n")
        assert psql.wait(60) == 0
        output = _read_to_the_end(ours)
    assert "canceling statement due to user request" in output
    assert "found mine" in output


def _read_to_the_end(terminal: int) -> str:
    """All output of a terminal."""
    output = b""
    try:
        while data := os.read(terminal, 1 << 16):
            output += data
    except OSError:  # EIO: no process has it open any more
        pass
    return output.decode()
