"""Directories that another user of the machine created or changes: `ls` and `sweep` are safe."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pgtemp.cli.group import cli
from pgtemp.host import procfs, removal
from pgtemp.host.tree import Tree
from pgtemp.supervisor import crash, inventory, leftovers
from pgtemp.supervisor.leftovers import DATA, LEASE, UNFINISHED_SECONDS, sweep_directory
from support import run_pgtemp

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
NAMES = [
    b"pgtemp-two\nlines",
    b"pgtemp-\x1b[2J\x1b]0;title\x07",
    "pgtemp-\u202egnp.exe\u2066".encode(),
    "pgtemp-\x9b31m".encode(),
    b"pgtemp-\xff\xfe\x80",
    b"pgtemp-[red]x[link=file:etc][bold]",
    "pgtemp-日本-é".encode(),
]


def plant(run_dir: Path, lease: str = "discard\n1 1\n") -> Path:
    """A run directory as it is left if its owner and supervisor are killed together."""
    (run_dir / DATA / "base").mkdir(parents=True)
    (run_dir / LEASE).write_text(lease)
    return run_dir


def found_in(directory: Path) -> list[inventory.Found]:
    """The run directories in a directory, without others on the machine."""
    run_dirs = inventory.run_directories([directory])
    return [found for found in run_dirs if found.path.parent == directory]


def run_to_the_end(steps: leftovers.Steps) -> OSError | None:
    """Run a removal step by step; return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: OSError | None = done.value
            return result


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def victim_in(directory: Path) -> Path:
    """A directory that looks abandoned, which no sweep of another directory may change."""
    return plant(directory / "pgtemp-x")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_names_are_escaped(open_dir: Path, encoding: str) -> None:
    """Each directory is one printable line, in any encoding; JSON has the exact name."""
    paths = [plant(open_dir / os.fsdecode(name)) for name in NAMES]
    env = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for command in (["ls"], ["sweep", "--dry-run"]):
        result = subprocess.run(
            [sys.executable, "-m", "pgtemp", *command, str(open_dir)],
            capture_output=True, check=False, env={**os.environ, **env}, timeout=60,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        text = result.stdout.decode(encoding)
        assert text.replace("\n", "").isprintable()
        if command != ["ls"]:
            assert len([line for line in text.splitlines() if str(open_dir) in line]) == len(paths)
            assert "pgtemp-two\\nlines" in text
            assert "[red]x[link=file:etc][bold]" in text
    shown = json.loads(run_pgtemp("ls", "--json", str(open_dir)).stdout)
    assert {str(path) for path in paths} <= {one["path"] for one in shown["left"]}
    result = run_pgtemp("sweep", "--json", str(open_dir), env=env)
    assert result.stdout.isascii()
    swept = json.loads(result.stdout)["found"]
    assert {str(path) for path in paths} <= {one["path"] for one in swept if one["removed"]}
    assert list(open_dir.iterdir()) == []


def test_names_of_databases_that_are_not_numbers(open_dir: Path) -> None:
    """Directory names with digits of other scripts, links and long numbers do not break `ls`."""
    base = plant(open_dir / "pgtemp-digits") / DATA / "base"
    for name in ("\N{SUPERSCRIPT TWO}", "\N{ROMAN NUMERAL TEN}", "9" * 250):
        (base / name).mkdir()
    (open_dir / "16999").mkdir()
    (open_dir / "16999" / "pg_filenode.map").touch()
    (base / "16999").symlink_to(open_dir / "16999")
    (found,) = found_in(open_dir)
    assert found.databases == 0
    assert run_pgtemp("ls", str(open_dir)).returncode == 0


def test_a_truncated_command_line_shows_no_part_of_a_password() -> None:
    """A password is recognized by the end of its URL, so no truncated URL is shown."""
    filler, uri = "x" * 1900, "postgresql://me:geheim" + "g" * 200 + "@localhost/x"
    code = "import sys; print(flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", code, filler, uri, "://:" * 20000]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        shown = procfs.command(process.pid)
        process.communicate()
    assert shown.startswith(sys.executable)
    assert shown.endswith(" ...")
    assert "geheim" not in shown


def test_a_directory_that_takes_the_name_during_a_removal(open_dir: Path) -> None:
    """Only the inspected directory is emptied and removed, even if another has its name now."""
    for kind in ("directory", "link"):
        left = plant(open_dir / f"pgtemp-{kind}")
        precious = open_dir / f"precious-{kind}"
        (precious / DATA).mkdir(parents=True)
        (precious / "file").touch()
        with opened(open_dir) as parent:
            steps = sweep_directory(parent, left.name)
            next(steps)
            (name,) = open_dir.glob(f"pgtemp-{kind}*")
            name.rename(open_dir / f"away-{kind}")
            if kind == "link":
                name.symlink_to(precious)
            else:
                precious.rename(name)
            run_to_the_end(steps)
        assert (name / "file").exists()
        assert (name / DATA).exists()
        assert os.listdir(open_dir / f"away-{kind}") == []
        name.rename(open_dir / f"was-{kind}")


def test_an_empty_directory_that_takes_the_name(open_dir: Path) -> None:
    """It is not removed in place of the inspected directory."""
    left = plant(open_dir / "pgtemp-empty")
    with opened(open_dir) as parent:
        steps = sweep_directory(parent, left.name)
        next(steps)
        (name,) = open_dir.glob("pgtemp-empty*")
        name.rename(open_dir / "away")
        name.mkdir()
        run_to_the_end(steps)
    assert name.exists()
    name.rmdir()


@pytest.mark.parametrize("place", ["parent", "above"])
def test_a_parent_directory_replaced_by_a_link(open_dir: Path, place: str) -> None:
    """If a parent becomes a link after the search, nothing is removed or measured elsewhere."""
    elsewhere = open_dir / "elsewhere"
    victim = victim_in(elsewhere / "b")
    (victim / "file").write_bytes(bytes(1 << 20))
    plant(open_dir / "a" / "b" / "pgtemp-x")
    (found,) = found_in(open_dir / "a" / "b")
    if place == "parent":
        (open_dir / "a" / "b").rename(open_dir / "old")
        (open_dir / "a" / "b").symlink_to(elsewhere / "b")
    else:
        (open_dir / "a").rename(open_dir / "old")
        (open_dir / "a").symlink_to(elsewhere)
    assert (found.path / "file").exists()
    assert found.size == 0
    assert not found.sweep().removed
    assert (victim / LEASE).exists()


def test_links_inside_are_not_followed(open_dir: Path) -> None:
    """This holds for sizes, for databases and for a removal."""
    outside = open_dir / "outside"
    (outside / "base" / "16999").mkdir(parents=True)
    (outside / "base" / "16999" / "pg_filenode.map").write_bytes(bytes(1 << 20))
    for name in ("data", "base", "lease-is-a-link"):
        run_dir = open_dir / f"pgtemp-{name}"
        plant(run_dir)
        if name == "data":
            shutil.rmtree(run_dir / DATA)
            (run_dir / DATA).symlink_to(outside)
        else:
            (run_dir / DATA / "base").rmdir()
            (run_dir / DATA / "base").symlink_to(outside / "base")
    for found in found_in(open_dir):
        assert found.databases == 0
        assert found.size < 1 << 20
        assert found.sweep().removed
    assert (outside / "base" / "16999" / "pg_filenode.map").exists()


def test_names_that_a_removal_uses_may_exist_already(open_dir: Path) -> None:
    """A tree with entries that have the names of a removal's own files is removed completely."""
    left = plant(open_dir / "pgtemp-names")
    for number in range(1, 20):
        (left / f".gone-{number}" / "x").mkdir(parents=True)
        (left / DATA / f"{number}" / "deep" / "deeper").mkdir(parents=True)
    with opened(open_dir) as parent:
        assert run_to_the_end(sweep_directory(parent, left.name)) is None
    assert not left.exists()


def test_an_interrupted_removal(open_dir: Path) -> None:
    """The next sweep continues it, even if the lease file has been removed already."""
    left = plant(open_dir / "pgtemp-short")
    (left / DATA / "deep" / "deeper").mkdir(parents=True)
    with opened(open_dir) as parent:
        steps = sweep_directory(parent, left.name)
        while any(open_dir.glob("*/lease")):
            next(steps)
        steps.close()
        assert len(list(open_dir.iterdir())) == 1
        for _ in leftovers.sweep(str(open_dir)):
            pass
    assert list(open_dir.iterdir()) == []


def test_a_lease_file_that_was_replaced(open_dir: Path) -> None:
    """If `pgtemp open` takes over a persisted directory meanwhile, its new lease file stays."""
    left = plant(open_dir / "pgtemp-kept", "keep\n1 1\n")
    with opened(open_dir) as parent, opened(left) as run_dir, open(left / LEASE) as old:
        (left / "lease.new").write_text("keep\n2 2\n")
        (left / "lease.new").rename(left / LEASE)
        steps = leftovers._sweep_abandoned(parent, left.name, run_dir, old.fileno())
        assert run_to_the_end(steps) is not None
    assert (left / LEASE).read_text() == "keep\n2 2\n"


def sweep_here(directory: Path) -> Result:
    """Run `pgtemp sweep DIRECTORY` in this process; its exit status is the `return_value`."""
    return CliRunner().invoke(cli, ["sweep", str(directory)], standalone_mode=False)


def as_user(user: str, work: Callable[[], object]) -> None:
    """Call a function as another user, in a child process."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            entry = pwd.getpwnam(user)
            os.setgroups([])
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_another_users_leftovers_are_no_error(open_dir: Path, other_user: str) -> None:
    """Root removes all of them; an ordinary user leaves them alone. The status is 0 each time."""
    old = UNFINISHED_SECONDS * 2

    def make() -> None:
        plant(open_dir / "pgtemp-left").chmod(0o755)
        (open_dir / "pgtemp-left" / LEASE).chmod(0o644)
        for name in ("pgtemp-half", "pgtemp-x.gone"):
            (open_dir / name).mkdir(mode=0o755)
            os.utime(open_dir / name, (old, old))
        (open_dir / "pgtemp-x.gone" / "file").touch()
        (open_dir / "pgtemp-link").symlink_to("/nonexistent")

    as_user(other_user, make)

    def sweep_as_nobody() -> None:
        for _ in range(2):
            result = sweep_here(open_dir)
            assert result.return_value == 0, result.output
            assert result.output.count("left alone") == 3, result.output
            assert other_user in result.output
            assert "belongs to another user" in result.output

    as_user("nobody", sweep_as_nobody)
    with opened(open_dir) as parent:
        for one in list(open_dir.iterdir()):
            # As the supervisor does, for its own user only.
            run_to_the_end(sweep_directory(parent, one.name))
    assert len(list(open_dir.iterdir())) == 4
    swept = run_pgtemp("sweep", str(open_dir))
    assert (swept.returncode, swept.stdout.count(f"removed {open_dir}")) == (0, 3)
    assert [one.name for one in open_dir.iterdir()] == ["pgtemp-link"]


def contents(directory: Path) -> dict[str, bytes]:
    """Name and content of each file below a directory."""
    return {one.name: one.read_bytes() for one in directory.rglob("*") if one.is_file()}


@needs_root
@pytest.mark.parametrize("mode", [0o1777, 0o757, 0o775])
@pytest.mark.parametrize("name", ["pgtemp-scratch", "pgtemp-scratch.gone"])
def test_a_directory_that_others_may_write_to(
    open_dir: Path, other_user: str, name: str, mode: int
) -> None:
    """It is not a run directory, even if its lease file has the same user: all its files stay."""
    scratch = plant(open_dir / name)
    (scratch / "precious").write_bytes(b"root's")
    scratch.chmod(mode)
    if name.endswith(".gone"):
        (scratch / LEASE).unlink()
    before = contents(scratch)
    for _ in range(2):
        result = run_pgtemp("sweep", str(open_dir))
        assert result.returncode == 0
        assert f"left alone {scratch}" in result.stdout
        assert contents(scratch) == before
    shutil.rmtree(scratch)


@needs_root
@pytest.mark.parametrize("how", ["own", "linked"])
def test_a_lease_file_of_another_user_in_a_directory_of_root(
    open_dir: Path, other_user: str, how: str
) -> None:
    """Root sweeps a directory only if its lease file has the same user and no second hard link."""
    run_dir = plant(open_dir / "pgtemp-scratch")
    run_dir.chmod(0o755)
    if how == "own":
        os.chown(run_dir / LEASE, pwd.getpwnam(other_user).pw_uid, -1)
    else:
        (open_dir / "second").hardlink_to(run_dir / LEASE)
    before = contents(run_dir)
    result = run_pgtemp("sweep", str(open_dir))
    assert (result.returncode, contents(run_dir)) == (0, before)
    assert "belongs to another user" in result.stdout


def mixed_ownership(directory: Path, user: str) -> dict[str, bytes]:
    """A directory of a user with files of root and a third user.

    Returns the files that must stay.
    """
    uid, third = pwd.getpwnam(user).pw_uid, pwd.getpwnam("nobody").pw_uid
    deep = directory / "proj" / "inner"
    for must_stay, owner in (("rootbackup/etc/default", 0), ("of-third", third)):
        (deep / must_stay).mkdir(parents=True)
        (deep / must_stay / f"file-{owner}").write_bytes(b"precious")
    (deep / "of-third" / "of-user").write_bytes(b"in a directory of a third user")
    for one in (deep / "of-third", deep / "of-third" / f"file-{third}"):
        os.chown(one, third, -1)
    (deep / "roots").write_bytes(b"not empty")
    (deep / "link-of-root").symlink_to("/etc")
    # Of the user, or left by a killed start: these are removed.
    (directory / "base" / "5" / "more").mkdir(parents=True)
    (directory / "base" / "5" / "more" / "empty").touch()
    (directory / "base" / "5" / "given").write_bytes(b"given away")
    (deep / "own").write_bytes(b"own")
    (directory / "own-link").symlink_to("/etc")
    for own in (
        directory, directory / "proj", deep, deep / "own", directory / "base",
        directory / "base" / "5" / "given", deep / "of-third" / "of-user", directory / "own-link",
    ):  # fmt: skip
        os.lchown(own, uid, -1)
    return {"file-0": b"precious", f"file-{third}": b"precious", "roots": b"not empty",
            "of-user": b"in a directory of a third user"}  # fmt: skip


@needs_root
def test_files_of_others_in_a_users_directory(open_dir: Path, other_user: str) -> None:
    """Root's sweep removes that user's files, and files that a killed start of root left there."""
    run_dir, uid = open_dir / "pgtemp-m", pwd.getpwnam(other_user).pw_uid
    must_stay = mixed_ownership(plant(run_dir), other_user)
    os.chown(run_dir / LEASE, uid, -1)
    for _ in range(2):
        result = run_pgtemp("sweep", str(open_dir))
        assert (result.returncode, result.stderr) == (0, "")
        assert "left alone" in result.stdout
        assert "belongs to another user" in result.stdout
        (left,) = open_dir.iterdir()
        assert contents(left) == must_stay
        assert not (left / "base").exists()
        assert not (left / "own-link").is_symlink()
        # Files that stay keep their path below root's directories.
        assert [*left.glob("**/rootbackup/etc/default/file-0")]
        assert [*left.glob("**/link-of-root")]
    shutil.rmtree(left)


@needs_root
def test_files_of_others_in_a_data_directory(open_dir: Path, other_user: str) -> None:
    """Neither a removal by root nor one that continues it removes them."""
    run_dir = plant(open_dir / "pgtemp-r")
    must_stay = mixed_ownership(run_dir / DATA, other_user)
    steps = 0
    while True:  # interrupted one step later each time
        work = removal.removal(run_dir)
        done = sum(1 for _ in zip(work, range(steps), strict=False))
        work.close()  # type: ignore[attr-defined]
        assert contents(run_dir).items() >= must_stay.items()
        if done < steps:
            break
        steps += 1
    assert contents(run_dir) == must_stay
    assert [one.name for one in run_dir.iterdir()] == [DATA]
    assert [*run_dir.glob("**/rootbackup/etc/default/file-0")]
    assert not (run_dir / DATA / "base").exists()


@needs_root
@pytest.mark.parametrize("owner", ["root", "nobody"])
def test_removing_another_users_directory_from_a_users_tree(
    open_dir: Path, other_user: str, owner: str
) -> None:
    """The user of the tree decides what may be removed, not the user of the directory itself."""
    uid, precious = pwd.getpwnam(other_user).pw_uid, open_dir / "data" / "16400" / "file"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"precious")
    if owner != "root":  # only root may decide what is removed there
        os.chown(precious, uid, -1)
    os.chown(precious.parent, pwd.getpwnam(owner).pw_uid, -1)
    os.chown(open_dir / "data", uid, -1)
    with Tree.open(open_dir / "data") as data:
        data.remove("16400")
    assert precious.read_bytes() == b"precious"


@needs_root
def test_a_server_of_a_third_user_in_a_planted_directory(
    open_dir: Path, impostor: Path, other_user: str
) -> None:
    """A user that can rename another user's data directory cannot make root's sweep kill."""
    run_dir, uid = plant(open_dir / "pgtemp-m"), pwd.getpwnam(other_user).pw_uid
    nobody = pwd.getpwnam("nobody").pw_uid
    os.chown(run_dir / DATA, nobody, -1)
    for one in (run_dir, run_dir / LEASE):
        os.chown(one, uid, -1)
    with subprocess.Popen([impostor], cwd=run_dir / DATA, user=nobody, **PIPES) as process:
        assert is_alive(process)
        assert run_pgtemp("sweep", str(open_dir)).returncode == 0
        assert is_alive(process)
    for left in open_dir.glob("pgtemp-m*"):
        shutil.rmtree(left)


@needs_root
def test_an_immutable_directory(open_dir: Path) -> None:
    """Each sweep skips it, with a reason and status 0, until it can be removed."""
    left = plant(open_dir / "pgtemp-immutable")
    changed = subprocess.run(["chattr", "+i", left / DATA], capture_output=True, check=False)
    if changed.returncode != 0:
        pytest.skip(f"nothing can be made immutable here: {changed.stderr.decode()}")
    try:
        for _ in range(2):
            result = run_pgtemp("sweep", str(open_dir))
            assert result.returncode == 0
            assert f"left alone {left}" in result.stdout
            assert os.strerror(errno.EPERM) in result.stdout
    finally:
        (found,) = open_dir.iterdir()
        subprocess.run(["chattr", "-i", found / DATA], check=True)
    assert run_pgtemp("sweep", str(open_dir)).returncode == 0
    assert list(open_dir.iterdir()) == []


@needs_root
@pytest.mark.parametrize("at", ["", DATA, f"{DATA}/base"])
def test_a_file_system_that_is_mounted_in_a_directory(open_dir: Path, at: str) -> None:
    """It is neither entered nor emptied, and it is no error."""
    left = plant(open_dir / "pgtemp-mounted")
    script = (
        'mount -t tmpfs tmpfs "$1" && mkdir -p "$1/data/base" && touch "$1/lease" "$1/precious" '
        '&& "$0" -m pgtemp sweep "$2" && "$0" -m pgtemp sweep "$2" && find "$2" -name precious'
    )
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, sys.executable, left / at, open_dir],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    if "unshare" in result.stderr or "mount:" in result.stderr:
        pytest.skip(f"nothing can be mounted: {result.stderr.strip()}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"left alone {left}" in result.stdout
    assert result.stdout.endswith("/precious\n")


def test_a_failed_removal_of_an_own_directory_is_an_error(
    open_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 1, with the reason: for example a failure of the disk, not a missing permission."""
    left = plant(open_dir / "pgtemp-broken")

    def fail(name: str, **_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(os, "rmdir", fail)
        result = sweep_here(open_dir)
    assert result.return_value == 1
    assert f"could not remove {left}" in result.output
    assert os.strerror(errno.EIO) in result.output


@pytest.fixture
def impostor(open_dir: Path) -> Path:
    """A program named postgres that is not PostgreSQL."""
    program = open_dir / "postgres"
    shutil.copy2(shutil.which("cat") or "/bin/cat", program)
    return program


def is_alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether a `cat` still echoes its input; a killed process may exist for a moment longer."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"x")
    return process.stdout.read(1) == b"x"


def test_a_program_of_another_user_in_an_abandoned_directory(
    open_dir: Path, impostor: Path, other_user: str
) -> None:
    """Root's sweep does not search for directories by this process, and does not kill it."""
    backup = plant(open_dir / "nested" / "pgtemp-backup")
    for directory in (open_dir / "nested", backup, backup / DATA):
        directory.chmod(0o755)
    entry = pwd.getpwnam(other_user)
    with subprocess.Popen(
        [impostor], cwd=backup / DATA, user=entry.pw_uid, group=entry.pw_gid, **PIPES
    ) as process:
        assert is_alive(process)
        assert backup not in [one.path for one in inventory.run_directories()]
        assert run_pgtemp("sweep").returncode == 0
        assert (backup / LEASE).exists()
        assert run_pgtemp("sweep", str(backup.parent)).returncode == 0
        assert not backup.exists()
        assert is_alive(process)


def test_a_pid_that_was_reused_is_not_killed(open_dir: Path, impostor: Path) -> None:
    """The process with that pid must still work in the directory when the signal is sent."""
    data, other = open_dir / "data", open_dir / "other"
    data.mkdir()
    other.mkdir()
    with subprocess.Popen([impostor], cwd=other, **PIPES) as process, opened(data) as directory:
        assert is_alive(process)
        crash._kill(directory, process.pid)
        assert is_alive(process)
        with opened(other) as its_own:
            crash._kill(its_own, process.pid)
        assert process.wait(60) == -crash.SIGKILL


def test_only_postgres_is_killed(open_dir: Path) -> None:
    """A shell or an editor that works in an abandoned data directory is not a server."""
    left = plant(open_dir / "pgtemp-shell")
    (found,) = found_in(open_dir)
    with subprocess.Popen(["cat"], cwd=left / DATA, **PIPES) as process:
        assert is_alive(process)
        assert found.sweep().removed
        assert is_alive(process)
