"""The example in Java."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from toolchain import copy_of, need, run

from support import Daemon

pytestmark = pytest.mark.slow
SCHEMA = "src/main/resources/db"


def test_junit_with_hikari(daemon: type[Daemon], tmp_path: Path) -> None:
    """Pools, canceled statements and errors of the JDBC driver."""
    need("mvn", "javac")
    example = copy_of("java_hikari", tmp_path)
    served = daemon("--template", f"test={example / SCHEMA}")
    output = run("mvn", "--batch-mode", "test", cwd=example, DATABASE_URL=served.uri)
    totals = re.findall(r"Tests run: (\d+), Failures: 0, Errors: 0, Skipped: 0$", output, re.M)
    assert totals == ["9"]
