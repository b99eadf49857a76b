"""What nobody could clean up: found, taken away, and never that of somebody who lives."""

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
mine(db.data_dir)
os.kill(supervision.current().pid, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


def abandon(base: Path, *, keep: bool = False) -> Path:
    """What is left of a server whose owner and whose warden were killed; its home."""
    owner = Owner(ABANDONED.format(base=str(base), keep=keep))
    assert owner.end() == -signal.SIGKILL
    (server,) = owner.servers
    assert eventually(lambda: not postgres_in(str(server.data_dir)))
    assert server.data_dir.exists()
    return server.data_dir.parent


def test_the_next_start_sweeps(open_dir: Path) -> None:
    """Of anybody of the same user, where it makes its own servers."""
    left = abandon(open_dir)
    with PgTempDB(data_dir_prefix=open_dir):
        assert eventually(lambda: not left.exists())


def test_busy_leftovers_of_all_three_killed_at_once(open_dir: Path) -> None:
    """The one limit: owner, warden and postmaster killed; the next sweep ends what computes."""
    owner = Owner(
        f"""
        db = PgTempDB(data_dir_prefix={str(open_dir)!r}).start()
        mine(db.data_dir)
        busy = db.connect()
        busy.pgconn.send_query(b"DO $$ BEGIN LOOP END LOOP; END $$")
        sys.stdin.readline()
        """
    )
    owner.hear("server")
    (server,) = owner.servers
    assert eventually(lambda: any(map(is_computing, postgres_in(str(server.data_dir)))))
    os.kill(server.warden, signal.SIGSTOP)  # so that it sees nothing before it is killed itself
    for pid in (server.postmaster, server.warden):
        os.kill(pid, signal.SIGKILL)
    owner.kill()
    assert eventually(lambda: len(postgres_in(str(server.data_dir))) == 1)
    said = run_pgtemp("sweep", "--json", str(open_dir))
    home = str(server.data_dir.parent)
    (found,) = (one for one in json.loads(said.stdout)["found"] if one["path"] == home)
    assert len(found["processes"]) == 1
    assert owner.left() == []


@pytest.mark.parametrize("keep", [False, True])
def test_the_command(open_dir: Path, keep: bool) -> None:
    """It says what it finds, and what it does; what was to be kept stays, and can be opened."""
    left = abandon(open_dir, keep=keep)
    said = run_pgtemp("sweep", "--dry-run", str(open_dir))
    assert f"found {left}" in said.stdout
    assert (left / LEASE).exists()
    said = run_pgtemp("sweep", str(open_dir))
    assert said.returncode == 0
    assert f"{'kept the data of' if keep else 'removed'} {left}" in said.stdout
    assert (left / DATA).exists() is keep
    assert not (left / LEASE).exists()
    said = run_pgtemp("sweep", "--json", str(open_dir))
    assert str(left) not in said.stdout


def test_a_living_sibling_is_not_swept(open_dir: Path) -> None:
    """Neither by a command nor by a start, with its owner stopped, or its warden just killed."""
    living = Owner(
        f"""
        db = PgTempDB(data_dir_prefix={str(open_dir)!r}).start()
        mine(db.data_dir)
        sys.stdin.readline()
        with db.connect() as connection:
            tell("alive", connection.execute("SELECT 7").fetchone())
        os.kill(supervision.current().pid, signal.SIGKILL)
        tell("killed")
        sys.stdin.readline()
        """
    )
    living.hear("server")
    (server,) = living.servers
    living.process.send_signal(signal.SIGSTOP)
    left = abandon(open_dir)
    with PgTempDB(data_dir_prefix=open_dir):
        assert eventually(lambda: not left.exists())
    assert run_pgtemp("sweep", str(open_dir)).returncode == 0
    living.process.send_signal(signal.SIGCONT)
    living.say("go")
    assert "(7,)" in living.hear("alive")
    living.hear("killed")
    run_pgtemp("sweep", str(open_dir))
    assert server.data_dir.exists()
    living.end()
    assert eventually(lambda: living.left() == [])


def test_a_recycled_pid_is_a_stranger(open_dir: Path) -> None:
    """A lease, and a postmaster.pid, that name somebody else's process: it is left alone."""
    left = abandon(open_dir)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        started = procfs.started(stranger.pid)
        (left / LEASE).write_text(f"discard\n{stranger.pid} {started}\n")
        (left / DATA / "postmaster.pid").write_text(f"{stranger.pid}\n{left / DATA}\n{started}\n")
        assert run_pgtemp("sweep", str(open_dir)).returncode == 0
        assert not left.exists()
        assert stranger.poll() is None
        stranger.communicate(b"\n")
        assert stranger.returncode == 0


def test_somebody_elses_server_behind_a_link(open_dir: Path) -> None:
    """A link to a living server's data, in a home that nobody holds, does not end that server."""
    left = abandon(open_dir)
    with PgTempDB() as living, living.connect() as connection:
        (left / DATA).rename(left / "old")
        (left / DATA).symlink_to(living.data_dir)
        assert run_pgtemp("sweep", str(open_dir)).returncode == 0
        assert not left.exists()
        assert connection.execute("SELECT 7").fetchone() == (7,)
        assert living.data_dir.exists()


@pytest.mark.parametrize("note", [b"x y", b"\xff\xfe", b"1 2 3", None])
def test_a_postmaster_pid_that_says_nothing(open_dir: Path, note: bytes | None) -> None:
    """What a server, or somebody in its place, has written there upsets no sweep."""
    left = abandon(open_dir)
    pid_file = left / DATA / "postmaster.pid"
    if note is None:
        os.mkfifo(pid_file)
    else:
        pid_file.write_bytes(b"1\n" * 6 + note + b"\nready\n")
    assert run_pgtemp("sweep", str(open_dir)).returncode == 0
    assert not left.exists()


def test_a_lease_that_is_no_file(open_dir: Path) -> None:
    """A pipe, a link or a directory in its place hangs nobody."""
    for name, make in (
        ("pipe", os.mkfifo),
        ("link", lambda path: os.symlink("/dev/zero", path)),
        ("directory", os.mkdir),
    ):
        home = open_dir / f"pgtemp-{name}"
        home.mkdir()
        make(home / LEASE)
    assert run_pgtemp("ls", str(open_dir)).returncode == 0
    assert run_pgtemp("sweep", str(open_dir)).returncode == 0
    with PgTempDB(data_dir_prefix=open_dir) as db, db.connect() as connection:
        assert connection.execute("SELECT 7").fetchone() == (7,)
    # The server's own directory is removed behind our back.
    assert eventually(lambda: len(list(open_dir.glob("pgtemp-*/lease"))) == 3)


def test_a_tree_of_any_depth_is_removed(open_dir: Path) -> None:
    """Deeper than Python recurses, and than a path may be long; the warden lives on."""
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


def test_pid_and_start_time_tell_an_owner(open_dir: Path) -> None:
    """A process that has got the pid of the owner since is not shown as the owner."""
    with PgTempDB(data_dir_prefix=open_dir) as db:
        lease = db.data_dir.parent / LEASE
        (found,) = (
            one for one in inventory.run_directories([open_dir]) if one.path == lease.parent
        )
        assert found.owner == os.getpid()
        assert len(found.processes) > 1
        said = lease.read_text().split()
        lease.write_text(f"{said[0]}\n{said[1]} {int(said[2]) - 1}\n")
        (found,) = (
            one for one in inventory.run_directories([open_dir]) if one.path == lease.parent
        )
        assert (found.owner, found.lives) == (None, True)


def test_a_sweep_takes_what_is_half_made_and_no_folder_of_another_kind(open_dir: Path) -> None:
    """A folder of kept databases, or a cache, is no home that was never finished, however old."""
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


def test_what_is_just_being_made_is_nobodys_leftover(open_dir: Path) -> None:
    """A directory without a lease may get one; only an old one was left."""
    new, old = open_dir / "pgtemp-new", open_dir / "pgtemp-old"
    for one in (new, old):
        one.mkdir()
    os.utime(old, (0, 0))
    run_pgtemp("sweep", str(open_dir))
    assert new.exists()
    assert not old.exists()
    new.rmdir()


def test_half_built_images_go(open_dir: Path) -> None:
    """Of a builder that was killed; not of one that is at work."""
    images = open_dir / "cache" / "images"
    images.mkdir(parents=True)
    for name in ("dead", "living"):
        (images / f"{name}.building").mkdir()
    with locks.locked(images / "living.lock"):
        said = run_pgtemp("sweep", env={"PGTEMP_CACHE_DIR": str(open_dir / "cache")})
    assert f"{images / 'dead.building'}, which was never finished" in said.stdout
    assert [one.name for one in images.glob("*.building")] == ["living.building"]


@pytest.mark.slow
def test_who_has_servers(open_dir: Path, daemon: type[Daemon]) -> None:
    """`pgtemp ls` shows a daemon with its leases, a program, and what others have left."""
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
        said = run_pgtemp("ls", "--json", str(open_dir))
        told = json.loads(said.stdout)
        owners = {owner["pid"]: owner for owner in told["owners"]}
        here, there = owners[os.getpid()], owners[served.process.pid]
        assert (there["servers"], there["uri"]) == (1, served.uri)
        assert [lease["session"] for lease in there["leases"]] == [None, "word"]
        assert there["databases"] > 2
        assert there["size"] > 1 << 20
        assert "-m pgtemp" in there["command"]
        assert here["leases"] is None
        assert here["servers"] >= 1
        assert here["age"] > 0
        assert str(again) in [one["path"] for one in told["left"]]
        shown = run_pgtemp("ls", str(open_dir)).stdout
        assert f"{served.process.pid} " in shown
        assert "pgtemp sweep" in shown
        assert db.password not in shown
    rundir.discard([str(again)])


def test_a_password_on_a_command_line_is_not_shown() -> None:
    other = Owner(
        """
        db = PgTempDB().start()
        mine(db.data_dir)
        uri = 'postgresql://me:geheim@localhost/x'  # -c SCRIPT is on the command line
        # [red], [/tmp/nothing], \033[31m
        sys.stdin.readline()
        """
    )
    other.hear("server")
    table = run_pgtemp("ls").stdout
    assert "[red], [/tmp/nothing]" in " ".join(table.split())
    assert "\033" not in table
    shown = run_pgtemp("ls", "--json").stdout
    assert f'"pid": {other.process.pid}' in shown
    assert "postgresql://me:***@localhost/x" in shown
    assert "geheim" not in shown
    other.end()


def test_another_users_servers(other_user: str) -> None:
    """Who is not root sees that they are there, no more, and sweeps none of them."""
    with PgTempDB() as db, db.connect() as connection:
        path = db.data_dir.parent

        def look() -> bytes:
            (found,) = (one for one in inventory.run_directories() if one.path == path)
            return f"{found.open} {found.lives} {found.sweep().removed}".encode()

        assert _as_user(other_user, look) == b"False True False"
        assert connection.execute("SELECT 7").fetchone() == (7,)


def _as_user(name: str, work: Callable[[], bytes]) -> bytes:
    """What something comes to in a child that is another user's."""
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
    with os.fdopen(reading, "rb") as said:
        answer = said.read()
    os.waitpid(child, 0)
    return answer
