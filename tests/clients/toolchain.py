"""Examples in other languages: copied, and run with their own tools against a daemon."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
_MADE = ("__pycache__", "node_modules", "target")
_SECONDS = 900  # the first build downloads and compiles the example's dependencies


def need(*programs: str) -> None:
    """Skip the test, with the name, if a program is not installed."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def copy_of(example: str, directory: Path) -> Path:
    """A copy of an example, so that the repository does not change."""
    copy = directory / example
    shutil.copytree(EXAMPLES / example, copy, ignore=shutil.ignore_patterns(*_MADE))
    return copy


def run(*argv: str | Path, cwd: Path, **env: str) -> str:
    """Run a program and return its output. The test fails if the program fails."""
    result = subprocess.run(
        argv, cwd=cwd, env={**os.environ, **env}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=_SECONDS,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr
