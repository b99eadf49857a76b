"""Sweeps find and remove what an owner and its supervisor left, and nothing of a running owner."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from owner import Owner, is_computing
from pgtemp import PgTempDB
from pgtemp.host import locks, procfs
from pgtemp.server import rundir
from pgtemp.supervisor import inventory
from pgtemp.supervisor.crash import postgres_in
from pgtemp.supervisor.leftovers import DATA, LEASE
from support import Daemon, eventually, run_pgtemp

ABANDONED = """
from pathlib import Path
base = Path({base!r})
db = PgTempDB(data_dir_prefix=base, persist={keep}).start()
report_server(db.data_dir)
os.kill(supervision.current().pid, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


def abandon(base: Path, *, keep: bool = False) -> Path:
    """The run directory of a server whose owner and supervisor were killed."""
    owner = Owner(ABANDONED.format(base=str(base), keep=keep))
    assert owner.end() == -signal.SIGKILL
    (server,) = owner.servers
    assert eventually(lambda: not postgres_in(str(server.data_dir)))
    assert server.data_dir.exists()
    return server.data_dir.parent


def test_the_next_start_sweeps(open_dir: Path) -> None:
    """A start sweeps its `data_dir_prefix`, for all owners of the same user."""
    left = abandon(open_dir)
    with PgTempDB(data_dir_prefix=open_dir):
        assert eventually(lambda: not left.exists())


def test_busy_leftovers_of_all_three_killed_at_once(open_dir: Path) -> None:
    """If owner, supervisor and postmaster are killed, the next sweep stops busy backends."""
    owner = Owner(
        f"""
        db = PgTempDB(data_dir_prefix={str(open_dir)!r}).start()
        report_server(db.data_dir)
        busy = db.connect()
        busy.pgconn.send_query(b"DO $$ BEGIN LOOP END LOOP; END $$")
        sys.stdin.readline()
        """
    )
    owner.wait_for("server")
    (server,) = owner.servers
    assert eventually(lambda: any(map(is_computing, postgres_in(str(server.data_dir)))))
    # So that the supervisor notices nothing before it is killed itself.
    os.kill(server.supervisor, signal.SIGSTOP)
    for pid in (server.postmaster, server.supervisor):
        os.kill(pid, signal.SIGKILL)
    owner.kill()
    assert eventually(lambda: len(postgres_in(str(server.data_dir))) == 1)
    result = run_pgtemp("sweep", "--json", str(open_dir))
    run_dir = str(server.data_dir.parent)
    (found,) = (one for one in json.loads(result.stdout)["found"] if one["path"] == run_dir)
    assert len(found["processes"]) == 1
    assert owner.leftovers() == []


@pytest.mark.parametrize("keep", [False, True])
def test_the_sweep_command(open_dir: Path, keep: bool) -> None:
    """It reports its findings and actions; persisted data stays and can be opened."""
    left = abandon(open_dir, keep=keep)
    result = run_pgtemp("sweep", "--dry-run", str(open_dir))
    assert f"found {left}" in result.stdout
    assert (left / LEASE).exists()
    result = run_pgtemp("sweep", str(open_dir))
    assert result.returncode == 0
    assert f"{'kept the data of' if keep else 'removed'} {left}" in result.stdout
    assert (left / DATA).exists() is keep
    assert not (left / LEASE).exists()
    result = run_pgtemp("sweep", "--json", str(open_dir))
    assert str(left) not in result.stdout


def test_a_running_owner_is_not_swept(open_dir: Path) -> None:
    """Neither a command nor a start sweeps it, even if it is stopped or its supervisor killed."""
    running = Owner(
        f"""
        db = PgTempDB(data_dir_prefix={str(open_dir)!r}).start()
        report_server(db.data_dir)
        sys.stdin.readline()
        with db.connect() as connection:
            report("alive", connection.execute("SELECT 7").fetchone())
        os.kill(supervision.current().pid, signal.SIGKILL)
        report("killed")
        sys.stdin.readline()
        """
    )
    running.wait_for("server")
    (server,) = running.servers
    running.process.send_signal(signal.SIGSTOP)
    left = abandon(open_dir)
    with PgTempDB(data_dir_prefix=open_dir):
        assert eventually(lambda: not left.exists())
    assert run_pgtemp("sweep", str(open_dir)).returncode == 0
    running.process.send_signal(signal.SIGCONT)
    running.send("go")
    assert "(7,)" in running.wait_for("alive")
    running.wait_for("killed")
    run_pgtemp("sweep", str(open_dir))
    assert server.data_dir.exists()
    running.end()
    assert eventually(lambda: running.leftovers() == [])


def test_a_reused_pid_in_a_lease_file_is_ignored(open_dir: Path) -> None:
    """A lease file and a postmaster.pid that name another process do not affect that process."""
    left = abandon(open_dir)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as unrelated:
        started = procfs.started(unrelated.pid)
        (left / LEASE).write_text(f"discard\n{unrelated.pid} {started}\n")
        (left / DATA / "postmaster.pid").write_text(f"{unrelated.pid}\n{left / DATA}\n{started}\n")
        assert run_pgtemp("sweep", str(open_dir)).returncode == 0
        assert not left.exists()
        assert unrelated.poll() is None
        unrelated.communicate(b"\n")
        assert unrelated.returncode == 0


def test_a_link_to_a_running_servers_data(open_dir: Path) -> None:
    """A link to its data in an unlocked run directory does not stop that server."""
    left = abandon(open_dir)
    with PgTempDB() as running, running.connect() as connection:
        (left / DATA).rename(left / "old")
        (left / DATA).symlink_to(running.data_dir)
        assert run_pgtemp("sweep", str(open_dir)).returncode == 0
        assert not left.exists()
        assert connection.execute("SELECT 7").fetchone() == (7,)
        assert running.data_dir.exists()


@pytest.mark.parametrize("note", [b"x y", b"\xff\xfe", b"1 2 3", None])
def test_an_invalid_postmaster_pid(open_dir: Path, note: bytes | None) -> None:
    """Invalid content that a server or a tenant has written there does not stop a sweep."""
    left = abandon(open_dir)
    pid_file = left / DATA / "postmaster.pid"
    if note is None:
        os.mkfifo(pid_file)
    else:
        pid_file.write_bytes(b"1\n" * 6 + note + b"\nready\n")
    assert run_pgtemp("sweep", str(open_dir)).returncode == 0
    assert not left.exists()


def test_a_lease_file_that_is_not_a_regular_file(open_dir: Path) -> None:
    """A pipe, a link or a directory in its place blocks nothing."""
    for name, make in (
        ("pipe", os.mkfifo),
        ("link", lambda path: os.symlink("/dev/zero", path)),
        ("directory", os.mkdir),
    ):
        run_dir = open_dir / f"pgtemp-{name}"
        run_dir.mkdir()
        make(run_dir / LEASE)
    assert run_pgtemp("ls", str(open_dir)).returncode == 0
    assert run_pgtemp("sweep", str(open_dir)).returncode == 0
    with PgTempDB(data_dir_prefix=open_dir) as db, db.connect() as connection:
        assert connection.execute("SELECT 7").fetchone() == (7,)
    # The server's own directory is removed in the background.
    assert eventually(lambda: len(list(open_dir.glob("pgtemp-*/lease"))) == 3)


def test_a_tree_of_any_depth_is_removed(open_dir: Path) -> None:
    """It is deeper than Python's recursion limit and longer than a path may be.

    The supervisor survives.
    """
    left = abandon(open_dir)
    here = os.open(left / DATA, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("deep-deep", dir_fd=here)
        below = os.open("deep-deep", os.O_RDONLY, dir_fd=here)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=below))
        os.close(here)
        here = below
    os.close(here)
    assert run_pgtemp("ls", str(open_dir)).returncode == 0
    with PgTempDB(data_dir_prefix=open_dir) as db, db.connect() as connection:
        assert eventually(lambda: not left.exists())
        assert connection.execute("SELECT 7").fetchone() == (7,)


def test_pid_and_start_time_identify_an_owner(open_dir: Path) -> None:
    """Another process that has reused the owner's pid is not shown as the owner."""
    with PgTempDB(data_dir_prefix=open_dir) as db:
        lease = db.data_dir.parent / LEASE
        (found,) = (
            one for one in inventory.run_directories([open_dir]) if one.path == lease.parent
        )
        assert found.owner == os.getpid()
        assert len(found.processes) > 1
        fields = lease.read_text().split()
        lease.write_text(f"{fields[0]}\n{fields[1]} {int(fields[2]) - 1}\n")
        (found,) = (
            one for one in inventory.run_directories([open_dir]) if one.path == lease.parent
        )
        assert (found.owner, found.lives) == (None, True)


def test_a_sweep_removes_incomplete_run_directories_only(open_dir: Path) -> None:
    """Old directories of persisted databases and old caches are not removed."""
    half_made, failed = open_dir / "pgtemp-halfmade", open_dir / "pgtemp-failed"
    half_made.mkdir()
    (half_made / "lease.new").touch()
    (failed / "20250101-000000-1").mkdir(parents=True)
    for old in (half_made, failed):
        os.utime(old, (1e9, 1e9))
    with PgTempDB(data_dir_prefix=open_dir):
        assert eventually(lambda: not half_made.exists())
    assert eventually(lambda: list(open_dir.iterdir()) == [failed])
    assert list(failed.iterdir()) != []


def test_a_new_directory_without_a_lease_file_is_not_swept(open_dir: Path) -> None:
    """A directory without a lease file may get one soon; only an old one is a leftover."""
    new, old = open_dir / "pgtemp-new", open_dir / "pgtemp-old"
    for one in (new, old):
        one.mkdir()
    os.utime(old, (0, 0))
    run_pgtemp("sweep", str(open_dir))
    assert new.exists()
    assert not old.exists()
    new.rmdir()


def test_incomplete_images_are_swept(open_dir: Path) -> None:
    """Those of a killed builder are removed; those of a running one are not."""
    images = open_dir / "cache" / "images"
    images.mkdir(parents=True)
    for name in ("dead", "living"):
        (images / f"{name}.building").mkdir()
    with locks.locked(images / "living.lock"):
        result = run_pgtemp("sweep", env={"PGTEMP_CACHE_DIR": str(open_dir / "cache")})
    assert f"{images / 'dead.building'}, which was left incomplete" in result.stdout
    assert [one.name for one in images.glob("*.building")] == ["living.building"]


@pytest.mark.slow
def test_ls_shows_owners_and_leftovers(open_dir: Path, daemon: type[Daemon]) -> None:
    """`pgtemp ls` shows a daemon with its leases, a process with the library, and leftovers."""
    left = abandon(open_dir)
    served = daemon("--isolation", "database")
    with (
        PgTempDB(data_dir_prefix=open_dir) as db,
        psycopg.connect(served.uri) as one,
        psycopg.connect(served.uri.replace("/test", "/test~word")),
    ):
        one.execute("SELECT 1")
        assert eventually(lambda: not left.exists())  # this start has swept it
        again = abandon(open_dir)
        result = run_pgtemp("ls", "--json", str(open_dir))
        listed = json.loads(result.stdout)
        owners = {owner["pid"]: owner for owner in listed["owners"]}
        here, there = owners[os.getpid()], owners[served.process.pid]
        assert (there["servers"], there["uri"]) == (1, served.uri)
        assert [lease["session"] for lease in there["leases"]] == [None, "word"]
        assert there["databases"] > 2
        assert there["size"] > 1 << 20
        assert "-m pgtemp" in there["command"]
        assert here["leases"] is None
        assert here["servers"] >= 1
        assert here["age"] > 0
        assert str(again) in [one["path"] for one in listed["left"]]
        shown = run_pgtemp("ls", str(open_dir)).stdout
        assert f"{served.process.pid} " in shown
        assert "pgtemp sweep" in shown
        assert db.password not in shown
    rundir.discard([str(again)])


def test_a_password_on_a_command_line_is_not_shown() -> None:
    other = Owner(
        """
        db = PgTempDB().start()
        report_server(db.data_dir)
        uri = 'postgresql://me:geheim@localhost/x'  # -c SCRIPT is on the command line
        # [red], [/tmp/nothing], \033[31m
        sys.stdin.readline()
        """
    )
    other.wait_for("server")
    table = run_pgtemp("ls").stdout
    assert "[red], [/tmp/nothing]" in " ".join(table.split())
    assert "\033" not in table
    shown = run_pgtemp("ls", "--json").stdout
    assert f'"pid": {other.process.pid}' in shown
    assert "postgresql://me:***@localhost/x" in shown
    assert "geheim" not in shown
    other.end()


def test_another_users_servers(other_user: str) -> None:
    """A user that is not root sees only that they exist, and sweeps none of them."""
    with PgTempDB() as db, db.connect() as connection:
        path = db.data_dir.parent

        def look() -> bytes:
            (found,) = (one for one in inventory.run_directories() if one.path == path)
            return f"{found.open} {found.lives} {found.sweep().removed}".encode()

        assert _as_user(other_user, look) == b"False True False"
        assert connection.execute("SELECT 7").fetchone() == (7,)


def _as_user(name: str, work: Callable[[], bytes]) -> bytes:
    """The result of a function that a child process calls as another user."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            entry = pwd.getpwnam(name)
            os.setgroups([])
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
            os.write(writing, work())
        except BaseException as error:
            os.write(writing, repr(error).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as results:
        answer = results.read()
    os.waitpid(child, 0)
    return answer
