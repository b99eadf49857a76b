"""`pgtemp doctor`: each check, in a good and in a bad environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import run_pgtemp

NAMES = (
    "programs", "user", "locale", "data", "socket", "localhost", "cache", "reflink", "supervision",
    "leftovers", "server", "extensions",
)  # fmt: skip
Checks = dict[str, dict[str, str]]


def checks(result: subprocess.CompletedProcess[str]) -> Checks:
    found = json.loads(result.stdout)
    assert found["ok"] is (result.returncode == 0)
    return {one["name"]: one for one in found["checks"]}


def test_no_check_fails() -> None:
    """On a machine on which the test suite passes, no check fails.

    The table and the JSON output agree.
    """
    found = checks(run_pgtemp("doctor", "--json"))
    assert tuple(found) == NAMES
    assert {one["verdict"] for one in found.values()} <= {"ok", "warning"}
    assert "UTF8" in found["server"]["found"]
    result = run_pgtemp("doctor")
    assert result.returncode == 0
    assert all(name in result.stdout for name in NAMES)
    assert "Traceback" not in result.stderr


def test_each_version(any_version: str) -> None:
    """The checks use the requested version of the programs."""
    found = checks(run_pgtemp("doctor", "--json", "--pg-version", any_version))
    assert found["programs"]["found"].startswith(f"{any_version}.")
    assert found["server"]["verdict"] == "ok"


def test_without_programs(open_dir: Path) -> None:
    """The status is 1, and the remedy is the one that a failed start names."""
    result = run_pgtemp("doctor", "--json", "--bin-dir", str(open_dir))
    assert result.returncode == 1
    found = checks(result)
    assert found["programs"]["verdict"] == found["server"]["verdict"] == "failed"
    assert "PGTEMP_BIN" in found["programs"]["cure"]
    assert found["cache"]["verdict"] == "ok"
    assert "failed" in run_pgtemp("doctor", "--bin-dir", str(open_dir)).stdout


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    found = checks(run_pgtemp("doctor", "--json", env={"PGTEMP_CACHE_DIR": str(file / "below")}))
    assert found["cache"]["verdict"] == "failed"
    assert "PGTEMP_CACHE_DIR" in found["cache"]["cure"]


def test_a_user_that_does_not_exist() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can choose a user")
    found = checks(run_pgtemp("doctor", "--json", "--run-as", "nobody-of-that-name"))
    assert found["user"]["verdict"] == "failed"
    assert "useradd" in found["user"]["cure"]


def test_data_on_disk(open_dir: Path) -> None:
    """A slow file system is a warning with a remedy; the status stays 0."""
    result = run_pgtemp("doctor", "--json", "--data-dir-prefix", str(open_dir))
    data = checks(result)["data"]
    if "(tmpfs" in data["found"]:
        pytest.skip("the temporary directory is on tmpfs")
    assert data["verdict"] == "warning"
    assert "--shm-size" in data["cure"]
    assert result.returncode == 0


def test_a_small_shared_memory() -> None:
    """As in a container that has 64 MB of shared memory."""
    script = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$0" -m pgtemp doctor --json'
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, sys.executable],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    if not result.stdout:
        pytest.skip(f"no mount namespace can be made: {result.stderr.strip()}")
    data = checks(result)["data"]
    assert "/dev/shm" not in data["found"]
    assert (data["verdict"], "--shm-size" in data["cure"]) == ("warning", True)


@pytest.mark.parametrize("command", ["ls", "sweep"])
def test_a_directory_that_does_not_exist(command: str) -> None:
    """One line and status 2."""
    result = run_pgtemp(command, "/no/such/place")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "/no/such/place" in result.stderr
