"""The examples: each runs in a copy, as a user would run it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pgtemp.host import identity
from pgtemp.programs.installation import Installation

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[1] / "examples"
MOVED = EXAMPLES / "moved_from_pytest_postgresql"
# How many tests pass, and the plugins that they need; the key is the file or directory.
WITH_PYTEST = {
    "fixture_pytest.py": (6, ("pgtemp",)),
    "psycopg_sync_async": (4, ("pgtemp", "asyncio")),
    "asyncpg_pool": (3, ("pgtemp", "asyncio")),
    "sqlalchemy_alembic": (5, ("pgtemp", "asyncio")),
    "fastapi_app": (3, ("pgtemp", "asyncio")),
    "flask_app": (2, ("pgtemp",)),
    "sqlmodel_app": (2, ("pgtemp",)),
    "moved_from_pytest_postgresql/after": (5, ("pgtemp",)),
}
WITH_UNITTEST = {"unittest_case": 2, "moved_from_testing_postgresql/after": 3}
# Variables of pytest's own processes, which the processes of the examples must not inherit.
_OF_PYTEST = ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_")


def copy_of(example: str, directory: Path) -> Path:
    """A copy of an example in its own directory, so that the repository does not change."""
    source, copy = EXAMPLES / example, directory / "example"
    if source.is_dir():
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        copy.mkdir()
        shutil.copy(source, copy)
    return copy


def run(argv: list[str], cwd: Path, **more: str) -> str:
    """Run a program and return its output. The test fails if the program fails."""
    env = {name: text for name, text in os.environ.items() if not name.startswith(_OF_PYTEST)}
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **more}
    result = subprocess.run(
        argv, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def with_pytest(*arguments: str, plugins: tuple[str, ...]) -> list[str]:
    """The command line; a connection that a test leaves open is an error."""
    named = [word for plugin in plugins for word in ("-p", plugin)]
    return [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *named,
        *(["-W", "error::pgtemp.PgTempWarning"] if "pgtemp" in plugins else []), *arguments,
    ]  # fmt: skip


def passed(output: str) -> int:
    """How many tests passed, in the output of pytest or unittest."""
    found = re.search(r"^(\d+) passed|^Ran (\d+) tests", output, re.M)
    assert found is not None, output
    return int(found[1] or found[2])


@pytest.mark.parametrize("example", WITH_PYTEST)
def test_with_pytest(example: str, tmp_path: Path) -> None:
    count, plugins = WITH_PYTEST[example]
    copy = copy_of(example, tmp_path)
    target = example if example.endswith(".py") else "."
    assert passed(run(with_pytest(target, plugins=plugins), copy)) == count


@pytest.mark.parametrize("example", ["asyncpg_pool", "moved_from_pytest_postgresql/after"])
def test_with_pytest_in_two_processes(example: str, tmp_path: Path) -> None:
    count, plugins = WITH_PYTEST[example]
    copy = copy_of(example, tmp_path)
    assert passed(run(with_pytest("-n", "2", plugins=(*plugins, "xdist")), copy)) == count


@pytest.mark.parametrize("example", WITH_UNITTEST)
def test_with_unittest(example: str, tmp_path: Path) -> None:
    output = run([sys.executable, "-m", "unittest"], copy_of(example, tmp_path))
    assert passed(output) == WITH_UNITTEST[example]


def test_a_program(tmp_path: Path) -> None:
    output = run([sys.executable, "app_asyncio.py"], copy_of("app_asyncio.py", tmp_path))
    assert output == "hello\n"


def test_the_original_suite_with_pytest_postgresql(open_dir: Path, programs: Installation) -> None:
    """The suite before the move passes with pytest-postgresql."""
    copy = copy_of("moved_from_pytest_postgresql/before", open_dir)
    argv = with_pytest(
        "--basetemp", str(open_dir / "base"),
        "--postgresql-exec", str(programs.program("pg_ctl")),
        plugins=("pytest_postgresql",),
    )  # fmt: skip
    assert passed(run(_as_server_user(argv), copy, TMPDIR=str(open_dir))) == 5


def test_the_original_suite_with_testing_postgresql(open_dir: Path, programs: Installation) -> None:
    """The suite before the move passes with testing.postgresql."""
    copy = copy_of("moved_from_testing_postgresql/before", open_dir)
    argv = _as_server_user([sys.executable, "-m", "unittest"])
    path = f"{programs.bin_dir}{os.pathsep}{os.environ['PATH']}"
    assert passed(run(argv, copy, PATH=path, TMPDIR=str(open_dir))) == 3


def test_the_move_changed_no_test() -> None:
    """Only conftest.py of the suite for pytest-postgresql differs."""
    before, after = MOVED / "before", MOVED / "after"
    names = {path.name for path in before.iterdir() if path.is_file()}
    assert names == {path.name for path in after.iterdir() if path.is_file()}
    differ = {name for name in names if (before / name).read_text() != (after / name).read_text()}
    assert differ == {"conftest.py"}


def test_every_example_is_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.iterdir():
        if path.name not in ("README.md", "__pycache__"):
            assert f"`{path.name}" in table


def _as_server_user(argv: list[str]) -> list[str]:
    """The command as the server user: the old suites run PostgreSQL as their own user.

    Root's interpreter may be readable only by root, hence the capability.
    """
    owner = identity.choose(None)
    if not owner.switch:
        return argv
    if (setpriv := shutil.which("setpriv")) is None:
        pytest.skip("PostgreSQL is not run by root, and setpriv is not installed")
    reading = [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]
    who = [f"--reuid={owner.uid}", f"--regid={owner.gid}", "--clear-groups"]
    return [setpriv, *who, *reading, *argv]
