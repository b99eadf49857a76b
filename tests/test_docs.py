"""The documentation is correct: tables are current, and commands and snippets run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support import Daemon, run_pgtemp

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_table_of_options_is_current() -> None:
    """docs/options.md is what `make docs` would write."""
    script = "import options_table; print(options_table.table(), end='')"
    made = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT / "docs",
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout == (ROOT / "docs" / "options.md").read_text()


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_the_snippets_of_the_readme_run(snippet: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", snippet], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_every_command_of_the_cheat_sheet_works(daemon: type[Daemon], tmp_path: Path) -> None:
    """Each line `pgtemp … URI` of the table starts a daemon."""
    (tmp_path / "dump.sql").write_text("CREATE TABLE t ();")
    (tmp_path / "password").write_text("geheim\n")
    lines = [line for line in re.findall(r"^\| `pgtemp (.*?)`", README, re.M) if "URI" in line]
    assert len(lines) >= 5
    for line in lines:
        line = line.replace("dump.sql", str(tmp_path / "dump.sql"))
        words = shlex.split(line.replace("FILE", str(tmp_path / "password")))
        assert daemon(*[word for word in words if word != "URI"]).end()[0] == 0
    assert run_pgtemp("serve", "--help").returncode == 0
