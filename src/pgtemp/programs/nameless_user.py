"""Copies of PostgreSQL's programs, for a user that cannot access them or that has no name.

In a container that is run with `--user 1234`, or with a number that OpenShift chooses, the user has
no entry in /etc/passwd. PostgreSQL itself runs for such a user. initdb, and the `postgres --single`
that it starts, call `getpwuid` to get a name and exit if there is none, although the name is not
needed, because pgtemp passes the superuser's name. pgtemp therefore runs initdb from a copy of
these two programs that imports `getpwent` instead, which returns the first user of the system. Both
function names have the same length and imports are resolved by name, so nothing else in the files
changes. nss_wrapper would work too, but has to be installed; user namespaces would work too, but
most containers forbid them.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from pgtemp.host import disk_space

_IMPORTED, _REPLACEMENT = b"\0getpwuid\0", b"\0getpwent\0"


def copy_for_all_users(root: Path, target: Path) -> None:
    """Copy a tree of programs, with the libraries that a wheel stores next to its package.

    Raises:
        OSError: the copy cannot be written, for example because the disk is full; it is removed.
    """
    fresh = target.with_suffix(".building")
    shutil.rmtree(fresh, ignore_errors=True)
    package = fresh / root.parent.name
    try:
        _copy_tree(root, package / root.name)
        libraries = root.parent.with_name(root.parent.name + ".libs")
        if libraries.is_dir():
            _copy_tree(libraries, fresh / libraries.name)
        _make_readable(fresh)
        fresh.rename(target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _copy_tree(source: Path, target: Path) -> None:
    try:
        shutil.copytree(source, target, symlinks=True)
    except shutil.Error as failures:  # it contains a list of messages
        first = str(failures.args[0][0][-1])
        number = errno.ENOSPC if disk_space.says_full(first) else errno.EIO
        raise OSError(number, os.strerror(number)) from failures


def _make_readable(tree: Path) -> None:
    """Let all users read and run the files of a tree, whatever the umask of its installation."""
    for directory, _, files in os.walk(tree):
        for path in (Path(directory), *(Path(directory, name) for name in files)):
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(mode | (0o555 if mode & stat.S_IXUSR else 0o444))


def copy_without_lookup(bin_dir: Path, names: Sequence[str], target: Path) -> Path:
    """Copy programs so that they do not look up the user's name; return their directory.

    The programs find their other files relative to their own path. `target` therefore gets the same
    tree of directories, in which all other entries are links to the originals.
    """
    here = target
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
            (here / name).write_bytes(program.replace(_IMPORTED, _REPLACEMENT))
            (here / name).chmod(0o700)
        else:
            (here / name).symlink_to(bin_dir / name)
    return here


def _entries(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:  # a directory that this user may enter, but not read
        return []
