"""Removing directories, one entry a step, in a tree that another user may change meanwhile.

A user can move directories that hold files of other users. So where root removes a directory of
another user, it removes only what it finds of that user, and what its own killed starts leave:
directories and empty files of root.

The supervisor's process imports this too, so it imports nothing that is slow.
"""

from __future__ import annotations

import errno
import os
import stat

from pgtemp.host.openat import DIRECTORY, quietly

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    StrPath = str | os.PathLike[str]
    # Work in small steps; its result says what failed.
    Steps = Generator[None, None, OSError | None]

ASIDE = ".gone"  # ends the name of a directory that is being removed
_ROOT = 0
# So deep, directories of root in another user's directory are removed where they are. Deeper ones
# are moved up as all others; if one of them must stay, it has lost its name.
_IN_PLACE = 16


def remove(path: StrPath) -> None:
    """Remove a path whose parent directory is trusted; what resists is left."""
    for _ in removal(path):
        pass


def removal(path: StrPath) -> Iterator[None]:
    """Remove a path whose parent directory is trusted, one entry a step; never fails."""
    above, name = os.path.split(path)
    try:
        parent = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        yield from removal_at(parent, name)
    finally:
        os.close(parent)


def removal_at(parent: int, name: str, user: int | None = None) -> Iterator[None]:
    """Remove a name in an open directory, one entry a step; never follows a link, never fails.

    Args:
        user: whose the tree is that the directory is in, if that is not the caller, who is root.
    """
    try:
        top = os.open(name, DIRECTORY, dir_fd=parent)
    except OSError:
        quietly(os.unlink, name, dir_fd=parent)
        return
    try:
        yield from remove_open(parent, name, top, user)
    finally:
        os.close(top)


def remove_open(parent: int, name: str, top: int, user: int | None = None) -> Steps:
    """Remove an open directory and all that is in it; the first failure, if it remains.

    A directory that has taken its name since stays.
    """
    failure = yield from _empty(top, user)
    try:
        if is_entry(top, parent, name):
            os.rmdir(name, dir_fd=parent)
    except OSError as error:
        return failure or error
    return None


def _empty(top: int, user: int | None) -> Steps:
    """Remove all that is in a directory; the first failure.

    By descriptors: whoever may write to it cannot lead a removal by root elsewhere. A directory
    that is not empty is moved up to the top before it is looked into, so that however deep a tree
    is, nothing recurses and few descriptors are enough. A file system that is mounted below stays:
    what is mounted deeper cannot be moved, and what is mounted at the top is another device.

    Args:
        user: of whom entries may be removed, besides what root's killed starts leave; None for
            everybody's, until the removal by root comes to a directory of another user. That
            directory is a top of its own: nothing is moved out of it.
    """
    failure: OSError | None = None
    device, is_root = os.fstat(top).st_dev, os.geteuid() == _ROOT
    waiting = [""]
    again: list[str] = []  # directories that hold some which are removed in place
    while waiting:
        path = waiting.pop()
        try:
            here = _enter(top, path)
        except OSError as error:
            failure = failure or error
            continue
        try:
            status = os.fstat(here)
            if status.st_dev != device:
                raise OSError(errno.EBUSY, "a file system is mounted in it")
            if is_root and user is None and status.st_uid != _ROOT:
                failure = (yield from _empty(here, status.st_uid)) or failure
                continue
            if user is not None and status.st_uid not in (user, _ROOT):
                raise _anothers()
            with os.scandir(here) as entries:
                found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
            for child, is_dir in found:
                try:
                    in_place = user is not None and _is_roots(here, child, user)
                    if not is_dir:
                        os.unlink(child, dir_fd=here)
                    elif not path:
                        waiting.append(child)
                    elif in_place and path.count("/") < _IN_PLACE:
                        waiting.append(f"{path}/{child}")
                        if again[-1:] != [path]:
                            again.append(path)
                    else:
                        # A name that nobody can take beforehand.
                        aside = f"{ASIDE}-{os.urandom(8).hex()}"
                        os.rename(child, aside, src_dir_fd=here, dst_dir_fd=top)
                        waiting.append(aside)
                except FileNotFoundError:
                    pass
                except OSError as error:
                    failure = failure or error
                yield
        except OSError as error:
            failure = failure or error
        finally:
            os.close(here)
            if path:
                quietly(_drop, top, path)
    for path in reversed(again):
        quietly(_drop, top, path)
        yield
    return failure


def _enter(top: int, path: str) -> int:
    """A descriptor of a directory below, or of the top itself for ""; follows no link."""
    here = os.dup(top)
    for name in path.split("/") if path else ():
        try:
            below = os.open(name, DIRECTORY, dir_fd=here)
        finally:
            os.close(here)
        here = below
    return here


def _drop(top: int, path: str) -> None:
    """Remove an empty directory below."""
    above, _, name = path.rpartition("/")
    parent = _enter(top, above)
    try:
        os.rmdir(name, dir_fd=parent)
    finally:
        os.close(parent)


def _is_roots(directory: int, name: str, user: int) -> bool:
    """Whether an entry is root's, rather than the user's.

    Raises:
        OSError: root must leave it.
    """
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if status.st_uid == user:
        return False
    # A start that was killed may have made these, and not given them away yet.
    empty = stat.S_ISREG(status.st_mode) and status.st_size == 0
    if status.st_uid != _ROOT or not (empty or stat.S_ISDIR(status.st_mode)):
        raise _anothers()
    return True


def _anothers() -> OSError:
    return PermissionError(errno.EPERM, "something in it belongs to another user")


def is_entry(opened: int, directory: int, name: str) -> bool:
    """Whether an open file or directory still has that name."""
    try:
        there = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(opened), there)
