"""The example with PostgreSQL's own programs, of each version against a daemon of the same."""

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


def folder(version: str) -> Path:
    """Where the programs of a version are, all of them."""
    found = next(one for one in search.available() if str(one.major) == version)
    within = found.within_reach(identity.choose(None))
    for name in PROGRAMS:
        if not (within.bin_dir / name).exists():
            pytest.skip(f"{within.bin_dir} has no {name}")
    return within.bin_dir


def test_programs(any_version: str, daemon: type[Daemon], tmp_path: Path) -> None:
    """psql, pgbench, pg_dump and pg_restore, with one connection and with several, and Ctrl-C."""
    need("bash")
    programs = folder(any_version)
    example = copy_of("programs", tmp_path)
    template = f"app={example / 'migrations'}"
    served = daemon("--bin-dir", str(programs), "--template", template, dbname="app")
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    said = run("./check.sh", cwd=example, DATABASE_URL=served.uri, PATH=path)
    assert len(re.findall(r"^ok \d+ - ", said, re.M)) == 14
    assert said.endswith("1..14\n")


def test_ctrl_c_at_the_prompt(daemon: type[Daemon], programs: Installation) -> None:
    """What is typed after a statement that was cancelled runs on the same connection."""
    need("setsid")
    uri = f"{daemon().uri}~typed"
    ours, theirs = pty.openpty()
    with (
        subprocess.Popen(
            ["setsid", "--ctty", programs.program("psql"), "-X", "-At", "--no-readline", uri],
            stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "PAGER": ""},
        ) as psql,
        open(ours, "r+b", buffering=0) as terminal,  # closed before psql is waited for: it hangs up
        psycopg.connect(uri, autocommit=True) as other,
    ):  # fmt: skip
        os.close(theirs)
        terminal.write(b"CREATE TEMP TABLE mine (n int); SELECT pg_sleep(600);\n")
        asleep = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event = 'PgSleep'"
        )
        assert eventually(lambda: other.execute(asleep).fetchone() == (1,))
        terminal.write(b"\x03")
        assert eventually(lambda: other.execute(asleep).fetchone() == (0,))
        terminal.write(b"SELECT 'found ' || 'mine' FROM pg_class WHERE relname = 'mine';\n\\q\n")
        assert psql.wait(60) == 0
        said = _all_of(ours)
    assert "canceling statement due to user request" in said
    assert "found mine" in said


def _all_of(terminal: int) -> str:
    """What was written to a terminal, to its end."""
    said = b""
    try:
        while data := os.read(terminal, 1 << 16):
            said += data
    except OSError:  # EIO: nobody has it open any more
        pass
    return said.decode()
