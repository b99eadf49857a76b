"""Copies of PostgreSQL's programs: for a user who cannot reach them, and for one without a name.

A user without a line in /etc/passwd is what containers make of `--user 1234`, and of the numbers
that OpenShift chooses. PostgreSQL runs for it; initdb, and the `postgres --single` that it starts,
ask `getpwuid` for a name and give up where there is none, though pgtemp has no use for it, since
it names the superuser. So initdb is run from a copy of the two that imports `getpwent` in its
place: the first user there is. The names are of one length and imports are looked up by name, so
nothing else in the files changes. nss_wrapper would do, but has to be installed; user namespaces
would, but most containers forbid them.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from pgtemp.host import disk_space

_ASKED, _INSTEAD = b"\0getpwuid\0", b"\0getpwent\0"


def for_everybody(root: Path, place: Path) -> None:
    """Copy a tree of programs, with the libraries that a wheel keeps beside its package.

    Raises:
        OSError: there is no room; nothing of it is left.
    """
    fresh = place.with_suffix(".building")
    shutil.rmtree(fresh, ignore_errors=True)
    package = fresh / root.parent.name
    try:
        _copy_tree(root, package / root.name)
        libraries = root.parent.with_name(root.parent.name + ".libs")
        if libraries.is_dir():
            _copy_tree(libraries, fresh / libraries.name)
        _open_up(fresh)
        fresh.rename(place)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _copy_tree(source: Path, target: Path) -> None:
    try:
        shutil.copytree(source, target, symlinks=True)
    except shutil.Error as failures:  # a whole list, of texts
        first = str(failures.args[0][0][-1])
        number = errno.ENOSPC if disk_space.says_full(first) else errno.EIO
        raise OSError(number, os.strerror(number)) from failures


def _open_up(tree: Path) -> None:
    """Let everybody read and run what is in a tree, whatever umask it was installed with."""
    for directory, _, files in os.walk(tree):
        for path in (Path(directory), *(Path(directory, name) for name in files)):
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(mode | (0o555 if mode & stat.S_IXUSR else 0o444))


def for_nobody(bin_dir: Path, names: Sequence[str], place: Path) -> Path:
    """Make programs in `place` that ask for no name; the folder they are in.

    They find what belongs to them by the way from where they are, so `place` gets a tree in which
    all else on that way is a link.
    """
    here = place
    for directory, child in zip([*reversed(bin_dir.parents)], bin_dir.parts[1:], strict=True):
        here.mkdir(mode=0o700)
        for name in _entries(directory):
            if name != child:
                (here / name).symlink_to(directory / name)
        here /= child
    here.mkdir(mode=0o700)
    for name in _entries(bin_dir):
        if name in names:
            program = (bin_dir / name).read_bytes()
            (here / name).write_bytes(program.replace(_ASKED, _INSTEAD))
            (here / name).chmod(0o700)
        else:
            (here / name).symlink_to(bin_dir / name)
    return here


def _entries(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:  # a directory that may be passed, but not read
        return []
