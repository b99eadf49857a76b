"""Fixtures: a cache for the session, each PostgreSQL version, and a check for leftovers."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgtemp.host import identity, locks
from pgtemp.programs import search
from pgtemp.programs.installation import Installation
from pgtemp.supervisor.crash import postgres_in
from pgtemp.supervisor.leftovers import LEASE, PREFIX
from project import MIGRATE, Project
from support import Daemon, eventually, homes

VERSIONS = (15, 16, 17, 18)


@pytest.fixture(scope="session", autouse=True)
def cache() -> Iterator[Path]:
    """A cache that is empty at first, and that the server user can read."""
    path = Path(tempfile.mkdtemp(prefix="test-of-cache-"))
    path.chmod(0o755)
    os.environ["PGTEMP_CACHE_DIR"] = str(path)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session", autouse=True)
def signals() -> None:
    """Background jobs of a shell ignore SIGINT, and jobs of nohup ignore SIGHUP.

    Without this fixture, all processes of the tests would ignore them too.
    """
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def nothing_left(cache: Path) -> Iterator[None]:
    """The suite leaves no run directory and no server process."""
    before, objects = homes(), _kernel_objects()
    yield
    # A locked directory belongs to a running owner, which is not of this suite: its owners have
    # exited.
    assert eventually(lambda: not _abandoned(before)), f"left behind: {_abandoned(before)}"
    assert not _orphans(), "servers run whose directory is gone"
    assert eventually(lambda: _kernel_objects() <= objects), _kernel_objects() - objects


def _kernel_objects() -> set[str]:
    """Shared memory segments to which no process is attached."""
    with open("/proc/sysvipc/shm") as table:
        rows = [line.split() for line in table][1:]
    posix = {path.name for path in Path("/dev/shm").glob("PostgreSQL.*")}
    return posix | {f"segment {row[1]} of uid {row[7]}" for row in rows if row[6] == "0"}


def _abandoned(before: set[Path]) -> set[Path]:
    return {home for home in homes() - before if not _is_locked(home)}


def _is_locked(home: Path) -> bool:
    try:
        return locks.is_locked(home / LEASE)
    except PermissionError:  # it belongs to another user
        return True


def _orphans() -> list[int]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            cwd = os.readlink(f"/proc/{pid}/cwd")
        except OSError:
            continue
        if f"/{PREFIX}" in cwd and cwd.endswith("(deleted)"):
            found.append(int(pid))
    return found


@pytest.fixture(params=VERSIONS)
def any_version(request: pytest.FixtureRequest) -> str:
    """Each major version in turn."""
    return str(need_version(request.param))


def need_version(major: int) -> int:
    if any(one.major == major for one in search.available()):
        return major
    if os.environ.get("CI"):
        pytest.fail(f"PostgreSQL {major} is not installed, and CI tests all versions")
    pytest.skip(f"PostgreSQL {major} is not installed")


@pytest.fixture
def programs() -> Installation:
    """The newest installed PostgreSQL, in a directory that the server user can read."""
    newest = max(search.available(), key=lambda one: one.release)
    return newest.within_reach(identity.choose(None))


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory like /tmp that, unlike pytest's own, the server user can enter."""
    path = Path(tempfile.mkdtemp(prefix="test-of-open-"))
    path.chmod(0o1777)
    yield path
    # A directory that is removed in the background may disappear during this check.
    eventually(lambda: not [name for name in os.listdir(path) if name.endswith(".gone")])
    shutil.rmtree(path, ignore_errors=True)
    assert not path.exists()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A directory with its own tests and a template; no databases are persisted."""
    made = Project(tmp_path)
    made.write("conftest.py", MIGRATE)
    return made


@pytest.fixture
def persisting(project: Project, open_dir: Path) -> Project:
    """The same, with a directory in which databases of failed tests are persisted."""
    project.persist_dir = open_dir
    return project


@pytest.fixture
def other_user() -> Iterator[str]:
    """A second ordinary user, created for the test."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a user")
    name = f"pgtemptest{os.getpid()}"
    subprocess.run(["useradd", "--create-home", name], check=True)
    Path(pwd.getpwnam(name).pw_dir).chmod(0o700)
    yield name
    subprocess.run(["userdel", "--remove", name], check=True, capture_output=True)


@pytest.fixture
def daemon() -> Iterator[type[Daemon]]:
    """Starts daemons; stops those that the test has not stopped."""
    yield Daemon
    for one in list(Daemon.running):
        one.end()


def leftovers(data_dir: Path) -> list[object]:
    """Everything that is left of a server: its directory and its processes."""
    return [*([data_dir] if data_dir.exists() else []), *postgres_in(str(data_dir))]
