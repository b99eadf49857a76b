"""The example in Python: a project that uses the daemon's URL and does not import pgtemp."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from clients.toolchain import EXAMPLES, copy_of, run
from support import Daemon

pytestmark = pytest.mark.slow
PLUGINS = ("asyncio", "django")


def passed(example: Path, uri: str, *arguments: str) -> int:
    """How many tests of the example pass, without other installed plugins."""
    named = [word for plugin in PLUGINS for word in ("-p", plugin)]
    output = run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error",
        *named, *arguments, cwd=example, DATABASE_URL=uri, PYTEST_ADDOPTS="",
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTHONDONTWRITEBYTECODE="1",
    )  # fmt: skip
    found = re.search(r"^(\d+) passed in ", output, re.M)
    assert found is not None, output
    return int(found[1])


@pytest.mark.parametrize("at_once", [(), ("-p", "xdist", "-n", "2")])
def test_drivers_and_frameworks(
    at_once: tuple[str, ...], daemon: type[Daemon], tmp_path: Path
) -> None:
    """psycopg, asyncpg, pg8000, SQLAlchemy and Django, in one process and in two."""
    example = copy_of("daemon_python", tmp_path)
    served = daemon("--template", f"app={example / 'migrations'}", dbname="app")
    assert passed(example, served.uri, *at_once) == 28


def test_django_migrates_the_template(daemon: type[Daemon], tmp_path: Path) -> None:
    """After `manage.py migrate` on the template, no session needs to migrate."""
    example = copy_of("daemon_python", tmp_path)
    served = daemon("--template", f"app={example / 'migrations'}", dbname="app")
    manage = [sys.executable, "manage.py", "migrate"]
    template = run(*manage, cwd=example, DATABASE_URL=f"{served.uri}~template")
    assert "Applying library.0001_initial... OK" in template
    assert "No migrations to apply" in run(*manage, cwd=example, DATABASE_URL=served.uri)
    assert passed(example, served.uri) == 28


def test_nothing_of_pgtemp_is_imported() -> None:
    """The project knows only the daemon's URL."""
    for path in (EXAMPLES / "daemon_python").rglob("*.py"):
        assert not re.search(r"^\s*(?:import|from) pgtemp", path.read_text(), re.M), path
