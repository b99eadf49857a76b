"""Which directories pgtemp uses: those that other users cannot change, nor any of their parents."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgtemp import OptionError
from pgtemp.host import identity, paths, trusted
from support import OTHER_UID, acting_as, run_pgtemp

MakeUntrusted = Callable[[Path], None]


def flaw(path: Path, *, sticky: bool = True) -> str:
    return trusted.find_flaw(path, sticky=sticky) or ""


def to_stranger(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    os.chown(path, OTHER_UID, OTHER_UID)


def to_all(path: Path) -> None:
    path.chmod(0o777)


def to_a_group(path: Path) -> None:
    """Other users may be members of it."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory to any group")
    os.chown(path, -1, OTHER_UID)
    path.chmod(0o775)


def to_one_by_acl(path: Path) -> None:
    """The mode has no bit for others, and that of the group is the list's mask (acl(5))."""
    anyone = 0xFFFFFFFF
    entries = [(1, 7, anyone), (2, 7, OTHER_UID), (4, 0, anyone), (16, 7, anyone), (32, 0, anyone)]
    listed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(path, "system.posix_acl_access", listed)
    except OSError as error:
        pytest.skip(f"no access control list can be set: {error}")
    assert path.stat().st_mode & 0o777 == 0o770


every_way = pytest.mark.parametrize(
    "make_untrusted", [to_stranger, to_all, to_a_group, to_one_by_acl]
)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """An empty directory of the owner, except for the directories `deep/er`."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    yield tmp_path


def test_usual_directories_are_trusted(directory: Path) -> None:
    """Directories of the owner and of the system, sticky ones, and missing ones in them."""
    for path in (
        directory,
        directory / "no" / "such",
        Path("/tmp"),
        Path("/dev/shm"),
        Path("/usr/share"),
    ):
        assert flaw(path) == ""


@every_way
def test_a_directory_that_others_can_change(directory: Path, make_untrusted: MakeUntrusted) -> None:
    """The error names it. Parents count as well, also those of links and of `..`."""
    make_untrusted(directory / "deep")
    (directory / "link").symlink_to("deep/er")
    (directory / "er").mkdir()
    (directory / "far").symlink_to(directory / "deep" / "back")
    (directory / "deep" / "back").symlink_to("../er")
    for path in ("deep", "deep/er", "deep/new", "link", "link/new", "deep/../er", "far"):
        assert flaw(directory / path).startswith(f"{directory / 'deep'}"), path
    assert flaw(directory / "er") == ""


def test_a_sticky_directory(directory: Path) -> None:
    """It may be a parent and may contain servers, but may not be the cache."""
    (directory / "deep").chmod(0o1777)
    assert flaw(directory / "deep") == flaw(directory / "deep" / "er", sticky=False) == ""
    assert flaw(directory / "deep", sticky=False).startswith(f"{directory / 'deep'} is writable")


def test_an_entry_that_another_user_made_in_a_sticky_directory(open_dir: Path) -> None:
    """A directory or a link is refused, even a link to a directory of the owner."""
    with acting_as(OTHER_UID):
        (open_dir / "made").mkdir()
        (open_dir / "link").symlink_to("/usr")
    for name in ("made", "link"):
        assert flaw(open_dir / name / "new") == f"{open_dir / name} belongs to user {OTHER_UID}"


def test_links_that_form_a_loop(directory: Path) -> None:
    """The error has the kernel's message."""
    (directory / "one").symlink_to("two")
    (directory / "two").symlink_to("one")
    assert "Too many levels" in flaw(directory / "one")


def as_user(uid: int, gid: int, code: str, *arguments: str, **env: str) -> str:
    """The output of Python code of another user.

    The modules are imported first, since that user may be unable to read them.
    """
    load = (
        "import ctypes, os, sys; from pathlib import Path; from pgtemp.host import paths, trusted"
    )
    become = f"os.setgroups([]); os.setgid({gid}); os.setuid({uid})"
    argv = [sys.executable, "-c", f"{load}\n{become}\n{code}", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=env, cwd="/")
    return done.stdout.strip() or done.stderr.strip().rpartition("\n")[2]


def test_a_users_private_group_may_write(other_user: str) -> None:
    """As with the umask 002 of Debian and Fedora, unless another user is in the group."""
    home = Path(f"~{other_user}").expanduser()
    home.chmod(0o775)
    found = home.stat()

    def as_owner() -> str:
        code = f"print(trusted.find_flaw(Path({str(home)!r}), sticky=False))"
        return as_user(found.st_uid, found.st_gid, code)

    assert as_owner() == "None"
    assert flaw(home) == f"{home} belongs to user {other_user}", (
        "as root, only root's directories are trusted"
    )
    os.chown(home, 0, found.st_gid)
    assert as_owner() == "None", "a directory of root that only the owner may write to"
    assert "mode 0775" in flaw(home)
    subprocess.run(["usermod", "--append", "--groups", other_user, "nobody"], check=True)
    try:
        assert "mode 0775" in as_owner()
    finally:
        subprocess.run(["gpasswd", "--delete", "nobody", other_user], check=True)
        os.chown(home, found.st_uid, found.st_gid)


@every_way
@pytest.mark.parametrize("option", ["PGTEMP_CACHE_DIR", "PGTEMP_DATA_DIR_PREFIX"])
def test_a_directory_that_an_option_names(
    directory: Path, option: str, make_untrusted: MakeUntrusted
) -> None:
    """One error with the remedy, and nothing is created there."""
    make_untrusted(directory / "deep")
    result = run_pgtemp("run", "--", "true", env={option: str(directory / "deep" / "er")})
    assert result.returncode == 2 and result.stdout == "", result
    assert result.stderr.count("\n") == 1 and f": {directory / 'deep'} " in result.stderr
    name = {"PGTEMP_DATA_DIR_PREFIX": "data_dir_prefix"}.get(option, option)
    remedy = result.stderr.partition(";")[2]
    assert name in remedy and "chmod" in remedy
    assert list((directory / "deep" / "er").iterdir()) == []


@every_way
def test_the_temporary_directory(
    directory: Path, make_untrusted: MakeUntrusted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused, also through a link, and no socket is created there."""
    (directory / "deep" / "er").chmod(0o1777)
    (directory / "link").symlink_to("deep/er")
    monkeypatch.setattr("tempfile.tempdir", str(directory / "link"))
    assert paths.temporary_dir() == (directory / "deep" / "er").resolve()
    make_untrusted(directory / "deep")
    with pytest.raises(OptionError, match="set TMPDIR"):
        paths.temporary_dir()
    assert paths.socket_base(identity.choose(None)) == Path("/tmp")
    assert directory / "deep" / "er" not in paths.sweep_bases()


CACHE = "print(paths.cache_dir())"


def test_a_cache_without_a_home(open_dir: Path) -> None:
    """It is in the temporary directory, unless another user has created it there."""
    env = {"TMPDIR": str(open_dir), "HOME": "/"}
    with acting_as(OTHER_UID + 1):
        (open_dir / f"pgtemp-cache-{OTHER_UID}").mkdir(0o755)
    output = as_user(OTHER_UID, OTHER_UID, CACHE, **env)
    assert f"belongs to user {OTHER_UID + 1}" in output and "PGTEMP_CACHE_DIR" in output
    (open_dir / f"pgtemp-cache-{OTHER_UID}").rename(open_dir / "aside")
    assert as_user(OTHER_UID, OTHER_UID, CACHE, **env) == f"{open_dir}/pgtemp-cache-{OTHER_UID}"


def test_a_home_that_others_can_change(open_dir: Path) -> None:
    """Neither the cache nor persisted data is stored there."""
    with acting_as(OTHER_UID):
        (open_dir / "home").mkdir()
    (open_dir / "home").chmod(0o777)
    env = {"HOME": str(open_dir / "home")}
    for code in (CACHE, "print(paths.scratch_base(None, keep=True))"):
        output = as_user(OTHER_UID, OTHER_UID, code, **env)
        assert f"{open_dir}/home is writable by other users" in output, output
    assert list((open_dir / "home").iterdir()) == []
    (open_dir / "home").chmod(0o755)
    assert as_user(OTHER_UID, OTHER_UID, CACHE, **env) == f"{open_dir}/home/.cache/pgtemp"


@pytest.mark.parametrize("late", [False, True])
def test_a_link_in_place_of_the_cache(
    open_dir: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Root does not open the target of another user's link, even if it is created in between."""
    closed = open_dir / "closed"
    closed.mkdir()
    closed.chmod(0o700)
    cache = open_dir / "cache"

    def attack() -> None:
        with acting_as(OTHER_UID):
            cache.symlink_to(closed)

    mkdir = Path.mkdir

    def mkdir_too_late(path: Path, *arguments: int, **named: int) -> None:
        attack()
        mkdir(path, *arguments, **named)  # type: ignore[arg-type]

    if late:
        monkeypatch.setattr(Path, "mkdir", mkdir_too_late)
    else:
        attack()
    monkeypatch.setenv("PGTEMP_CACHE_DIR", str(cache))
    with pytest.raises(OptionError, match=f"belongs to user {OTHER_UID}"):
        paths.cache_dir()
    assert closed.stat().st_mode & 0o777 == 0o700 and list(closed.iterdir()) == []


ALONE = f"""
libc = ctypes.CDLL(None)
libc.prctl(4, 1)  # PR_SET_DUMPABLE, so that /proc/self is owned by the user
if libc.unshare(0x10000000):  # CLONE_NEWUSER
    sys.exit("not allowed")
Path("/proc/self/uid_map").write_text("{OTHER_UID} {OTHER_UID} 1")
"""


def test_a_user_namespace_without_root(open_dir: Path) -> None:
    """The system's directories are trusted there, although they seem to belong to the overflow uid.

    Entries of a sticky directory that seem to belong to it are not trusted: they may be of any
    user.
    """
    with acting_as(OTHER_UID + 1):
        (open_dir / "made").mkdir()
    os.chown(open_dir, OTHER_UID, -1)
    code = f"{ALONE}print([trusted.find_flaw(Path(one), sticky=True) for one in sys.argv[1:]])"
    output = as_user(OTHER_UID, OTHER_UID, code, "/usr", "/tmp", f"{open_dir}/made")
    if output == "not allowed":
        pytest.skip("no user namespaces are allowed here")
    assert output.startswith(f"[None, None, '{open_dir}/made belongs to user "), output
