"""Trees that another user can change: no operation follows a link, blocks or uses foreign files."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgtemp import ClusterError
from pgtemp.host import file_copy, tree, user_paths
from pgtemp.host.file_copy import ChangedError
from pgtemp.host.tree import ForeignFileError, Tree

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
OTHER, ANOTHER = 64001, 64002  # users that need not exist


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the caller, outside the tree."""
    path = tmp_path / "secret"
    path.write_text("the caller's own")
    return path


@pytest.fixture
def theirs(tmp_path: Path) -> Iterator[Tree]:
    """A tree with one directory and one file; as root it belongs to another user."""
    top = tmp_path / "theirs"
    (top / "base").mkdir(parents=True)
    (top / "base" / "file").write_text("12345")
    if os.geteuid() == 0:
        for path in (top, top / "base", top / "base" / "file"):
            os.chown(path, OTHER, OTHER)
    with Tree.open(top) as opened:
        yield opened


def at(opened: Tree, name: str) -> Path:
    return Path(opened.path, name)


def a_link(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def a_pipe(path: Path, secret: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path, secret: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # its path may be too long for a socket
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def a_directory(path: Path, secret: Path) -> None:
    path.mkdir()


def a_device(path: Path, secret: Path) -> None:
    try:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("this user cannot make devices")


def a_file_of_the_caller(path: Path, secret: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.link(secret, path)


PLANTED = [a_link, a_pipe, a_socket, a_directory, a_device, a_file_of_the_caller]


@pytest.mark.parametrize("plant", PLANTED)
@pytest.mark.parametrize(
    "use",
    [lambda t: t.read("base/file", 99), lambda t: t.patch("base/file", 0, b"x")],
    ids=["read", "patch"],
)
def test_only_a_regular_file_of_the_tree_s_user_is_used(
    theirs: Tree,
    secret: Path,
    plant: Callable[[Path, Path], None],
    use: Callable[[Tree], object],
) -> None:
    """Anything else in its place is an error at once, and the caller's file is unchanged."""
    at(theirs, "base/file").unlink()
    plant(at(theirs, "base/file"), secret)
    with pytest.raises(OSError):
        use(theirs)
    assert secret.read_text() == "the caller's own"


@pytest.mark.parametrize("plant", PLANTED)
def test_a_listing_names_files_that_cannot_be_copied(
    theirs: Tree, secret: Path, plant: Callable[[Path, Path], None]
) -> None:
    """A link, a pipe, a device or another user's file is an error that names it."""
    plant(at(theirs, "base/planted"), secret)
    # a socket is ignored; the directory belongs to another user
    if plant in (a_socket, a_directory):
        if plant is a_directory and os.geteuid() == 0:
            with pytest.raises(ForeignFileError, match="belongs to uid 0"):
                file_copy.list_tree(theirs)
        return
    with pytest.raises(ClusterError, match="base/planted"):
        file_copy.list_tree(theirs)


@pytest.mark.parametrize("plant", PLANTED)
def test_a_file_replaced_after_the_listing_is_not_copied(
    theirs: Tree, secret: Path, tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    """The copy fails, and no byte of the caller's file is copied."""
    listing = file_copy.list_tree(theirs)
    at(theirs, "base/file").unlink()
    plant(at(theirs, "base/file"), secret)
    (tmp_path / "copy" / "base").mkdir(parents=True)
    with Tree.open(tmp_path / "copy") as copy, pytest.raises(ChangedError):
        file_copy.copy_files(theirs, copy, listing.files)
    assert b"own" not in (tmp_path / "copy" / "base" / "file").read_bytes()


def test_a_directory_replaced_by_a_link_is_not_entered(
    theirs: Tree, secret: Path, tmp_path: Path
) -> None:
    at(theirs, "base").rename(at(theirs, "moved"))
    at(theirs, "base").symlink_to(tmp_path)
    for use in (
        lambda: theirs.read("base/secret", 99),
        lambda: theirs.write("base/secret", b"x"),
        lambda: theirs.make_directory("base/new"),
        lambda: theirs.entries("base"),
    ):
        with pytest.raises(OSError):
            use()
    theirs.remove("base")
    assert theirs.status("base") is None
    assert secret.read_text() == "the caller's own"


def test_an_open_directory_stays_the_same(theirs: Tree, tmp_path: Path) -> None:
    """A file that is created in it after a replacement is in the original."""
    theirs.hold("base")
    at(theirs, "base").rename(at(theirs, "moved"))
    at(theirs, "base").symlink_to(tmp_path)
    theirs.write("base/new", b"x")
    assert at(theirs, "moved/new").read_bytes() == b"x"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("plant", PLANTED[:3])
def test_a_write_replaces_any_file_of_that_name(
    theirs: Tree, secret: Path, plant: Callable[[Path, Path], None]
) -> None:
    plant(at(theirs, "new"), secret)
    theirs.write("new", b"written")
    assert at(theirs, "new").read_bytes() == b"written"
    assert not at(theirs, "new").is_symlink()
    assert secret.read_text() == "the caller's own"


def test_creating_a_file_that_exists_fails(theirs: Tree, secret: Path) -> None:
    at(theirs, "new").symlink_to(secret.with_name("does not exist"))
    with pytest.raises(FileExistsError):
        theirs.create("new", theirs.fd)
    assert not secret.with_name("does not exist").exists()


def test_a_removal_stays_in_the_tree(theirs: Tree, secret: Path, tmp_path: Path) -> None:
    """It removes a link and keeps its target."""
    at(theirs, "base/link").symlink_to(tmp_path)
    if os.geteuid() == 0:
        os.chown(at(theirs, "base/link"), OTHER, OTHER, follow_symlinks=False)
    theirs.remove("base")
    assert theirs.status("base") is None
    assert secret.exists()


@AS_ROOT
def test_new_files_belong_to_the_user_before_they_have_a_name(tmp_path: Path) -> None:
    """A directory belongs to the caller until it is handed over."""
    (tmp_path / "home").mkdir()
    with Tree(os.open(tmp_path / "home", tree.DIRECTORY), "", OTHER, ANOTHER) as home:
        home.make_directory("data")
        home.write("data/file", b"x")
        assert (tmp_path / "home" / "data").stat().st_uid == 0
        home.hand_over("data")
    for path in (tmp_path / "home" / "data", tmp_path / "home" / "data" / "file"):
        assert (path.stat().st_uid, path.stat().st_gid) == (OTHER, ANOTHER)
    assert (tmp_path / "home" / "data").stat().st_mode & 0o777 == 0o700


@AS_ROOT
@pytest.mark.parametrize("inner", [0, ANOTHER])
def test_a_path_does_not_lead_from_one_user_to_another(tmp_path: Path, inner: int) -> None:
    """A user could have put any directory below its own."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    os.chown(tmp_path / "a", OTHER, OTHER)
    os.chown(tmp_path / "a" / "b", inner, inner)
    with pytest.raises(
        ForeignFileError, match=f"belongs to uid {inner}, but its directory to uid {OTHER}"
    ):
        user_paths.open_tree(tmp_path / "a" / "b")
    os.chown(tmp_path / "a" / "b", OTHER, OTHER)
    with user_paths.open_tree(tmp_path / "a" / "b") as reached:
        assert reached.uid == OTHER


def test_a_closed_tree_raises_an_error(theirs: Tree) -> None:
    theirs.close()
    theirs.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        theirs.read("base/file", 1)
