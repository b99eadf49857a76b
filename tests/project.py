"""A project with its own tests, which pytest runs as for any user."""

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
    """The result of a pytest run."""

    status: int
    output: str

    def count(self, outcome: str) -> int:
        """How many tests had this outcome."""
        words = self.output.splitlines()[-1].replace(",", "").replace("=", "").split()
        found = [int(n) for n, word in itertools.pairwise(words) if word == outcome]
        return sum(found)


@dataclass
class Project:
    """A directory with a conftest.py that defines a template."""

    root: Path
    persist_dir: Path | None = None  # for servers, and databases of failed tests
    plugins: list[str] = field(default_factory=lambda: ["pgtemp.pytest_plugin"])

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(dedent(text))

    def argv(self, *arguments: str) -> list[str]:
        flags = [part for plugin in self.plugins for part in ("-p", plugin)]
        option = (
            f"--pgtemp-data-dir-prefix={self.persist_dir}"
            if self.persist_dir
            else "--pgtemp-keep=none"
        )
        flags += ["-p", "no:cacheprovider", option]
        return [sys.executable, "-m", "pytest", *flags, *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, *arguments: str, text: str | None = None, **env: str) -> Result:
        """Run pytest on a test file with this text."""
        if text is not None:
            self.write("test_it.py", text)
        result = subprocess.run(
            self.argv(*arguments), cwd=self.root, env={**self.environment, **env},
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        return Result(result.returncode, result.stdout + result.stderr)

    def persisted_databases(self) -> dict[str, str]:
        """The persisted databases, with the test of each."""
        assert self.persist_dir is not None
        return {
            name: of
            for note in self.persist_dir.glob(f"pgtemp-failed/*/*/{NOTE}")
            for name, of in json.loads(note.read_text())["databases"].items()
        }
