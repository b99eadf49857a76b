"""The examples for Node.js, run with its own test runner."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clients.toolchain import copy_of, need, run
from support import Daemon

pytestmark = pytest.mark.slow


def installed(name: str, directory: Path) -> Path:
    """A copy of the example with its dependencies."""
    need("npm", "node")
    example = copy_of(name, directory)
    run("npm", "ci", "--silent", "--no-audit", "--no-fund", cwd=example)
    return example


def passed(example: Path, uri: str) -> int:
    """How many tests of the example pass."""
    output = run("npm", "test", cwd=example, DATABASE_URL=uri)
    counts = {word: int(number) for word, number in re.findall(r"^\W+(\w+) (\d+)$", output, re.M)}
    assert counts["tests"] == counts["pass"], output
    return counts["pass"]


def test_pg(daemon: type[Daemon], tmp_path: Path) -> None:
    """The driver `pg` and its pool, on a template built from migrations."""
    example = installed("node_pg", tmp_path)
    served = daemon("--template", f"app={example / 'migrations'}", dbname="app")
    assert passed(example, served.uri) == 7


def test_knex(daemon: type[Daemon], tmp_path: Path) -> None:
    """Knex, whose own migrations build the template through its URL."""
    example = installed("node_knex", tmp_path)
    served = daemon(dbname="app")
    run("npx", "knex", "migrate:latest", cwd=example, DATABASE_URL=f"{served.uri}~template")
    assert passed(example, served.uri) == 7
