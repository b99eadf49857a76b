"""Real clients through the daemon: psql and pgbench. tests/clients tests the examples."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from pgtemp.programs.installation import Installation
from support import Daemon


def run(*argv: str | Path, **env: str) -> str:
    """Run a program and return its output. The test fails if the program fails."""
    result = subprocess.run(
        argv, capture_output=True, text=True, check=False, env={**os.environ, **env}, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_psql(daemon: type[Daemon], programs: Installation) -> None:
    """One session runs several statements, COPY in both directions, and a notification."""
    served = daemon()
    script = (
        "CREATE TABLE t (n int);\nCOPY t FROM stdin;\n1\n2\n\\.\n"
        "LISTEN news; NOTIFY news, 'extra';\nSELECT sum(n) FROM t;\nCOPY t TO stdout;\n"
    )
    result = subprocess.run(
        [programs.program("psql"), "-X", "-At", served.uri],
        input=script, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "3\n1\n2\n" in result.stdout.replace(
        re.search(r"Asynchronous.*\n", result.stdout)[0],
        "",  # type: ignore[index]
    )
    assert 'notification "news" with payload "extra"' in result.stdout


@pytest.mark.slow
def test_pgbench_at_scale_10(daemon: type[Daemon], programs: Installation) -> None:
    """pgbench loads and uses a million rows, with and without reconnecting."""
    served = daemon("--single")
    pgbench = programs.program("pgbench")
    run(pgbench, "-i", "-s", "10", "-q", served.uri)
    once = run(pgbench, "-c", "4", "-j", "2", "-t", "100", served.uri)
    again = run(pgbench, "-C", "-c", "4", "-j", "2", "-t", "25", served.uri)
    assert "400/400" in once and "100/100" in again
    for output in (once, again):
        assert re.search(r"failed transactions: 0 ", output)


def test_large_values_in_both_directions(daemon: type[Daemon]) -> None:
    """A value larger than every buffer arrives byte for byte."""
    import psycopg

    served = daemon()
    data = os.urandom(1 << 20) * 32
    with psycopg.connect(served.uri) as connection:
        row = connection.execute("SELECT %b::bytea || ''", [data]).fetchone()
        assert row == (data,)
