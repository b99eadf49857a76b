"""A project with tests of its own, which pytest runs as for any user."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

from pgtemp.sql.persisted_note import NOTE

MIGRATE = """
    import psycopg
    import pytest

    def migrate(uri):
        with psycopg.connect(uri) as connection:
            connection.execute("CREATE TABLE account (id serial PRIMARY KEY, balance int)")

    @pytest.fixture(scope="session")
    def pgtemp_template():
        return migrate
"""


@dataclass
class Result:
    """What a run of pytest came to."""

    status: int
    output: str

    def count(self, outcome: str) -> int:
        """How many tests came out so."""
        words = self.output.splitlines()[-1].replace(",", "").replace("=", "").split()
        found = [int(n) for n, word in itertools.pairwise(words) if word == outcome]
        return sum(found)


@dataclass
class Project:
    """A directory with a conftest.py that has a template."""

    root: Path
    kept: Path | None = None  # where servers live, and databases of failed tests stay
    plugins: list[str] = field(default_factory=lambda: ["pgtemp.pytest_plugin"])

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(dedent(text))

    def argv(self, *arguments: str) -> list[str]:
        flags = [part for plugin in self.plugins for part in ("-p", plugin)]
        keep = f"--pgtemp-data-dir-prefix={self.kept}" if self.kept else "--pgtemp-keep=none"
        flags += ["-p", "no:cacheprovider", keep]
        return [sys.executable, "-m", "pytest", *flags, *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, *arguments: str, text: str | None = None, **env: str) -> Result:
        """Run pytest to its end, on a test file with this text."""
        if text is not None:
            self.write("test_it.py", text)
        result = subprocess.run(
            self.argv(*arguments), cwd=self.root, env={**self.environment, **env},
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        return Result(result.returncode, result.stdout + result.stderr)

    def kept_databases(self) -> dict[str, str]:
        """The databases that were kept, with the tests they are of."""
        assert self.kept is not None
        return {
            name: of
            for note in self.kept.glob(f"pgtemp-failed/*/*/{NOTE}")
            for name, of in json.loads(note.read_text())["databases"].items()
        }
