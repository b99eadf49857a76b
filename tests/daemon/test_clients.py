"""Real clients through the daemon: psql, pgbench. Those of examples/ are in tests/clients."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from pgtemp.programs.installation import Installation
from support import Daemon


def run(*argv: str | Path, **env: str) -> str:
    """A program's output; its failure is the test's."""
    result = subprocess.run(
        argv, capture_output=True, text=True, check=False, env={**os.environ, **env}, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_psql(daemon: type[Daemon], programs: Installation) -> None:
    """Several statements, COPY both ways, an error and a notification in one session."""
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
    """A million rows loaded and used through the daemon, with and without reconnecting."""
    served = daemon("--single")
    pgbench = programs.program("pgbench")
    run(pgbench, "-i", "-s", "10", "-q", served.uri)
    once = run(pgbench, "-c", "4", "-j", "2", "-t", "100", served.uri)
    again = run(pgbench, "-C", "-c", "4", "-j", "2", "-t", "25", served.uri)
    assert "400/400" in once and "100/100" in again
    for said in (once, again):
        assert re.search(r"failed transactions: 0 ", said)


def test_large_values_both_ways(daemon: type[Daemon]) -> None:
    """What is bigger than every buffer arrives byte for byte."""
    import psycopg

    served = daemon()
    data = os.urandom(1 << 20) * 32
    with psycopg.connect(served.uri) as connection:
        row = connection.execute("SELECT %b::bytea || ''", [data]).fetchone()
        assert row == (data,)
