"""The example in Python: a project that has the daemon's URL, and nothing of pgtemp."""

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
    """How many of its tests pass, without the plugins that happen to be installed here."""
    named = [word for plugin in PLUGINS for word in ("-p", plugin)]
    said = run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error",
        *named, *arguments, cwd=example, DATABASE_URL=uri, PYTEST_ADDOPTS="",
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTHONDONTWRITEBYTECODE="1",
    )  # fmt: skip
    found = re.search(r"^(\d+) passed in ", said, re.M)
    assert found is not None, said
    return int(found[1])


@pytest.mark.parametrize("at_once", [(), ("-p", "xdist", "-n", "2")])
def test_drivers_and_frameworks(
    at_once: tuple[str, ...], daemon: type[Daemon], tmp_path: Path
) -> None:
    """psycopg, asyncpg, pg8000, SQLAlchemy and Django; also in two processes at once."""
    example = copy_of("daemon_python", tmp_path)
    served = daemon("--template", f"app={example / 'migrations'}", dbname="app")
    assert passed(example, served.uri, *at_once) == 28


def test_django_migrates_the_template(daemon: type[Daemon], tmp_path: Path) -> None:
    """What `manage.py migrate` did to the template, no session has to do again."""
    example = copy_of("daemon_python", tmp_path)
    served = daemon("--template", f"app={example / 'migrations'}", dbname="app")
    manage = [sys.executable, "manage.py", "migrate"]
    template = run(*manage, cwd=example, DATABASE_URL=f"{served.uri}~template")
    assert "Applying library.0001_initial... OK" in template
    assert "No migrations to apply" in run(*manage, cwd=example, DATABASE_URL=served.uri)
    assert passed(example, served.uri) == 28


def test_nothing_of_pgtemp_is_imported() -> None:
    """The daemon's URL is all that the project knows."""
    for path in (EXAMPLES / "daemon_python").rglob("*.py"):
        assert not re.search(r"^\s*(?:import|from) pgtemp", path.read_text(), re.M), path
