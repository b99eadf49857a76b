"""Users, copies, locks and directories."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pgtemp import OptionError, PgTempDB
from pgtemp.host import file_copy, identity, locks, paths
from pgtemp.host.file_copy import ChangedError
from pgtemp.host.tree import Tree


def test_a_tree_is_copied_byte_for_byte(tmp_path: Path) -> None:
    """Names, contents, empty files and directories, with more files than one thread copies."""
    source, target = tmp_path / "source", tmp_path / "target"
    for i in range(150):
        file = source / f"d{i % 3}" / f"f{i}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.urandom(i * 100))
    (source / "empty").mkdir()
    (source / "left out").write_text("x")
    target.mkdir()
    with Tree.open(source) as there, Tree.open(target) as here:
        listing = file_copy.list_tree(there, ["left out"])
        for name in listing.dirs:
            here.make_directory(name)
        file_copy.copy_files(there, here, listing.files)
    (source / "left out").unlink()
    assert subprocess.run(["diff", "-r", source, target], check=False).returncode == 0
    assert listing.size == sum(i * 100 for i in range(150))


@pytest.mark.parametrize("size", [9, 11])
def test_a_file_of_another_size_is_detected(tmp_path: Path, size: int) -> None:
    (tmp_path / "a").write_bytes(bytes(size))
    (tmp_path / "to").mkdir()
    with (
        Tree.open(tmp_path) as source,
        source.below("to") as target,
        pytest.raises(ChangedError, match="bytes instead of 10"),
    ):
        file_copy.copy_files(source, target, [("a", 10)])


def test_a_lock_is_visible_to_another_process(tmp_path: Path) -> None:
    lock = tmp_path / "lease"
    descriptor = locks.create_locked(lock, b"keep\n")
    ask = (
        "import sys, pathlib, pgtemp.host.locks as l; print(l.is_locked(pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", ask, str(lock)]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"True\n"
    os.close(descriptor)
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"False\n"


def test_root_switches_and_others_do_not() -> None:
    chosen = identity.choose(None)
    assert chosen.switch == (os.geteuid() == 0)
    assert chosen.uid != 0
    with pytest.raises(OptionError, match="run_as"):
        identity.choose("no-such-user")
    with pytest.raises(OptionError, match="root"):
        identity.choose("root")


def test_the_error_names_a_directory_that_the_user_cannot_enter(
    other_user: str, tmp_path: Path
) -> None:
    chosen = identity.choose(other_user)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    blocked = chosen.blocked_at(closed / "x")
    assert blocked is not None and not blocked.stat().st_mode & 0o001
    with pytest.raises(OptionError, match="cannot enter"):
        PgTempDB(run_as=other_user, data_dir_prefix=closed).start()


def test_a_user_made_for_the_test_runs_the_server(other_user: str) -> None:
    with PgTempDB(run_as=other_user) as db, db.connect() as connection:
        assert db.data_dir.owner() == other_user
        assert Path(f"/proc/{db.pid}").owner() == other_user
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_directories_for_servers(tmp_path: Path) -> None:
    """A requested directory is used unchanged; persisted data is never on tmpfs."""
    assert paths.scratch_base(tmp_path, keep=True) == tmp_path
    assert paths.filesystem_type(Path("/dev/shm")) == "tmpfs"
    assert paths.filesystem_type(paths.scratch_base(None, keep=True)) != "tmpfs"
    with pytest.raises(OptionError, match="not a directory"):
        paths.scratch_base(tmp_path / "nowhere", keep=False)
