"""Paths in options: as root, another user's links and directories do not redirect them."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from pgtemp import OptionError, PgTempDB
from pgtemp.host import user_paths
from pgtemp.host.tree import ForeignFileError

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to lose")
OTHER, ANOTHER = 64001, 64002  # users that need not exist


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A directory of another user, next to one of the caller with a file `secret`."""
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
    (tmp_path / "ours" / "secret").write_text("only the caller may read this")
    if os.geteuid() == 0:
        os.chown(tmp_path / "theirs", OTHER, OTHER)
    return tmp_path / "theirs"


def link(path: Path, target: Path | str, owner: int = OTHER) -> Path:
    path.symlink_to(target)
    os.chown(path, owner, owner, follow_symlinks=False)
    return path


@AS_ROOT
@pytest.mark.parametrize("target", ["../ours/secret", "/etc/hostname"])
def test_a_link_below_another_users_directory(theirs: Path, target: str) -> None:
    """It is neither followed nor read, as the last component or before it."""
    for path in (link(theirs / "file", target), link(theirs / "dir", "../ours") / "secret"):
        with pytest.raises(ForeignFileError, match="is a link of another user"):
            user_paths.read_file(path)


@AS_ROOT
def test_a_parent_component_below_another_users_directory(theirs: Path) -> None:
    with pytest.raises(ForeignFileError, match="leads back out of a directory of uid"):
        user_paths.read_file(f"{theirs}/../ours/secret")


@AS_ROOT
def test_a_hard_link_and_a_directory_of_the_caller_below_another_users(theirs: Path) -> None:
    os.link(theirs.parent / "ours" / "secret", theirs / "file")
    with pytest.raises(ForeignFileError, match="belongs to uid 0"):
        user_paths.read_file(theirs / "file")
    (theirs / "inner").mkdir()
    with pytest.raises(
        ForeignFileError, match=f"belongs to uid 0, but its directory to uid {OTHER}"
    ):
        user_paths.open_tree(theirs / "inner")


@AS_ROOT
def test_another_users_link_in_a_sticky_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    tmp_path.chmod(0o1777)
    with pytest.raises(ForeignFileError, match="is a link of another user"):
        user_paths.read_file(link(tmp_path / "link", "file"))


def test_links_of_the_caller_are_followed(theirs: Path) -> None:
    """In every component, relative, absolute and through `..`; a loop is an error."""
    ours = theirs.parent / "ours"
    (ours / "name").symlink_to("secret")
    (theirs.parent / "way").symlink_to(ours)
    for path in (theirs.parent / "way" / "name", f"{ours}/../way/./name"):
        assert user_paths.read_file(path) == b"only the caller may read this"
    with user_paths.open_tree(theirs.parent / "way") as tree:
        assert tree.path == os.path.realpath(ours)
    (ours / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        user_paths.read_file(ours / "loop")


@AS_ROOT
@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_another_users_file_is_not_written(theirs: Path, kind: str) -> None:
    path = theirs / "log"
    if kind == "file":
        path.write_text("")
    else:
        os.mkfifo(path)
    os.chown(path, OTHER, OTHER)
    with pytest.raises(OSError):
        user_paths.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


@AS_ROOT
@pytest.mark.parametrize("option", ["postgresql_conf", "pg_hba_conf"])
def test_a_configuration_below_another_users_directory(theirs: Path, option: str) -> None:
    """A link there does not bring a file of root into a server's data directory."""
    path = link(theirs / "conf", theirs.parent / "ours" / "secret")
    with pytest.raises(OptionError, match="is a link of another user"):
        PgTempDB(**{option: path}).start()


@AS_ROOT
def test_a_hard_link_in_a_directory_that_others_can_write_to(tmp_path: Path) -> None:
    """Another user may have linked a file of root there; root does not write to it."""
    secret = tmp_path / "secret"
    secret.write_text("of root")
    shared = tmp_path / "shared"
    shared.mkdir()
    os.link(secret, shared / "log")
    for mode, refused in ((0o1777, True), (0o755, False)):
        shared.chmod(mode)
        with ExitStack() as expected:
            if refused:
                expected.enter_context(pytest.raises(ForeignFileError, match="another name"))
            os.close(user_paths.open_file(shared / "log", os.O_WRONLY | os.O_APPEND))
    assert secret.read_text() == "of root"
