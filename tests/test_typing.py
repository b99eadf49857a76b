"""The annotations of the public API: type checkers read programs such as users write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pgtemp

SOURCES = Path(pgtemp.__file__).parents[1]
PROGRAMS = Path(__file__).parent / "typed"


def run(*argv: str, **variables: str) -> None:
    """Run a Python program in the directory of the typed programs; its failure fails the test."""
    result = subprocess.run(
        [sys.executable, *argv],
        cwd=PROGRAMS,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_mypy_accepts_the_programs_and_reports_each_mistake(tmp_path: Path) -> None:
    """mypy finds an error of the stated kind in each line of mistakes.py that ignores one."""
    options = ("--config-file=", "--strict", f"--cache-dir={tmp_path}", "--no-pretty")
    run("-m", "mypy", *options, ".", MYPYPATH=str(SOURCES))


def test_pyright_accepts_the_programs_and_reports_each_mistake() -> None:
    """pyright finds an error in each line of mistakes.py that ignores one."""
    run("-m", "basedpyright", "--pythonpath", sys.executable)


def test_the_names_that_the_programs_import_exist() -> None:
    run("-c", "import coroutines, handles, settings, suite", PYTHONPATH=str(SOURCES))
