"""The examples in Go, run with Go's own tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from clients.toolchain import copy_of, need, run
from support import Daemon

pytestmark = pytest.mark.slow


def passed(example: Path, uri: str) -> int:
    """How many tests of the example pass."""
    output = run("go", "test", "-count=1", "-v", "./...", cwd=example, DATABASE_URL=uri)
    assert "--- SKIP" not in output
    return output.count("\n--- PASS: ")


def test_pgx(daemon: type[Daemon], tmp_path: Path) -> None:
    """Pools, contexts and errors of pgx, on a template built from migrations."""
    need("go")
    example = copy_of("go_pgx", tmp_path)
    served = daemon("--template", f"app={example / 'migrations'}", dbname="app")
    assert passed(example, served.uri) == 7


@pytest.mark.parametrize("dbname", ["test", "app"])
def test_database_sql(dbname: str, daemon: type[Daemon], tmp_path: Path) -> None:
    """The same with database/sql and lib/pq, migrated by each test or once by the daemon."""
    need("go")
    example = copy_of("go_database_sql", tmp_path)
    served = daemon("--template", f"app={example / 'migrations'}", dbname=dbname)
    assert passed(example, f"{served.uri}?sslmode=disable") == 7
