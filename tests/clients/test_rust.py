"""The examples in Rust.

They run in the repository, since cargo builds again at a different path. Their lock files are used
unchanged, and build results are stored in the user's cache, so only the first run takes minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import psycopg
import pytest
from toolchain import EXAMPLES, need, run

from support import Daemon

pytestmark = pytest.mark.slow
TESTS = {"rust_sqlx": 9, "rust_diesel": 8}
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgtemp-examples"
MIGRATE = ("cargo", "run", "--locked", "--quiet", "--bin", "migrate")


@pytest.fixture(params=TESTS)
def example(request: pytest.FixtureRequest) -> Path:
    """One of the examples, with all its dependencies built."""
    return built(request.param)


def built(name: str) -> Path:
    need("cargo", "cc")
    example = EXAMPLES / name
    needed = tomllib.loads((example / "Cargo.toml").read_text())["package"]["rust-version"]
    version = subprocess.run(["cargo", "--version"], capture_output=True, text=True, check=False)
    found = re.match(r"cargo (\d+\.\d+)", version.stdout)
    if found is None or _numbers(found[1]) < _numbers(needed):
        pytest.skip(f"{name} needs Rust {needed}, and there is {version.stdout or version.stderr}")
    output = run("cargo", "build", "--locked", "--all-targets", cwd=example, **env(example))
    assert "warning:" not in output
    return example


def env(example: Path) -> dict[str, str]:
    """The environment.

    Each example has its own directory, as their programs have the same names.
    """
    return {"CARGO_TARGET_DIR": str(CACHE / example.name), "CARGO_TERM_COLOR": "never"}


def passed(example: Path, served: Daemon, *more: str) -> int:
    """How many tests pass."""
    settings = env(example) | {"DATABASE_URL": served.uri}
    output = run("cargo", "test", "--locked", *more, cwd=example, **settings)
    return sum(map(int, re.findall(r"^test result: ok\. (\d+) passed", output, re.M)))


def migrated(served: Daemon) -> bool:
    """Whether a new database has the table."""
    with psycopg.connect(served.uri) as connection:
        found = connection.execute("SELECT to_regclass('account')").fetchone()
        return found is not None and found[0] is not None


def test_tests_that_migrate_their_databases(daemon: type[Daemon], example: Path) -> None:
    assert passed(example, daemon()) == TESTS[example.name]


def test_the_daemon_migrates_a_template(daemon: type[Daemon], example: Path) -> None:
    """The command runs in the daemon's working directory; all databases have its result."""
    template = ("--template", f"test=cmd:{' '.join(MIGRATE)}", "--watch", "test=migrations/")
    served = daemon(*template, before=("env", "-C", str(example)), env=env(example))
    assert migrated(served)
    assert passed(example, served) == TESTS[example.name]


def test_a_template_is_migrated_through_its_url(daemon: type[Daemon], example: Path) -> None:
    served = daemon()
    run(*MIGRATE, cwd=example, DATABASE_URL=f"{served.uri}~template", **env(example))
    assert migrated(served)
    assert passed(example, served) == TESTS[example.name]


def test_sqlx_creates_its_own_databases(daemon: type[Daemon]) -> None:
    """With a daemon for a single server, `#[sqlx::test]` works unchanged."""
    example = built("rust_sqlx")
    assert passed(example, daemon("--single"), "--", "--ignored") == 2


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]
