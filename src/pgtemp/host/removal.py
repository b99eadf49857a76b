"""Remove directories, one entry per step, in a tree that another user may change meanwhile.

If root removes a directory of another user, that user may have moved files of other users into it.
Root therefore removes only the files of that user, and those that a killed start leaves behind:
directories and empty files of root.

The supervisor process imports this module, so it imports no module that is slow to import.
"""

from __future__ import annotations

import errno
import os
import stat

from pgtemp.host.openat import DIRECTORY, Closing, descend, quietly

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    StrPath = str | os.PathLike[str]
    # Work in small steps; the generator's result is the first failure, or None.
    Steps = Generator[None, None, OSError | None]

REMOVING = ".gone"  # suffix of the name of a directory that is being removed
_ROOT = 0
# Down to this depth, directories of root in another user's directory are removed in place. Deeper
# ones are moved to the top like all others; if such a directory cannot be removed, its name is
# lost.
_IN_PLACE = 16


def remove(path: StrPath) -> None:
    """Remove a path whose parent directory is trusted; leave entries that cannot be removed."""
    for _ in removal(path):
        pass


def removal(path: StrPath) -> Iterator[None]:
    """Remove a path whose parent directory is trusted, one entry per step; never raises."""
    above, name = os.path.split(path)
    try:
        parent = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    with Closing(parent):
        yield from removal_at(parent, name)


def removal_at(parent: int, name: str, user: int | None = None) -> Iterator[None]:
    """Remove an entry of an open directory in steps; never follows a link, and never raises.

    Args:
        user: the user of the tree that contains the directory, if root removes it for another user.
    """
    try:
        top = os.open(name, DIRECTORY, dir_fd=parent)
    except OSError:
        quietly(os.unlink, name, dir_fd=parent)
        return
    with Closing(top):
        yield from remove_open(parent, name, top, user)


def remove_open(parent: int, name: str, top: int, user: int | None = None) -> Steps:
    """Remove an open directory and its contents; the result is the first failure, if it remains.

    If another directory has that name by now, it is not removed.
    """
    failure = yield from _empty(top, user)
    try:
        if is_entry(top, parent, name):
            os.rmdir(name, dir_fd=parent)
    except OSError as error:
        return failure or error
    return None


def _empty(top: int, user: int | None) -> Steps:
    """Remove the contents of a directory; the result is the first failure.

    It works through descriptors, so a user who can write to the directory cannot redirect a removal
    by root. Every subdirectory is moved to the top before it is emptied, so the removal does not
    recurse and needs few descriptors, however deep the tree is. Mounted file systems are not
    emptied: a deeper mount point cannot be moved, and one at the top is recognized by its device.

    Args:
        user: the user whose entries may be removed, in addition to those that a killed start by
            root left behind. None removes the entries of all users, until root reaches a directory
            of another user. Below it, only that user's entries are removed, and none is moved out.
    """
    failure: OSError | None = None
    device, is_root = os.fstat(top).st_dev, os.geteuid() == _ROOT
    waiting, again = [""], list[str]()
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
                raise _foreign()
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
                        # A name that another user cannot predict, and so cannot occupy.
                        moved = f"{REMOVING}-{os.urandom(8).hex()}"
                        os.rename(child, moved, src_dir_fd=here, dst_dir_fd=top)
                        waiting.append(moved)
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
    """Open a directory below the top, or the top itself for "", without following links."""
    return descend(os.dup(top), path.split("/") if path else ())


def _drop(top: int, path: str) -> None:
    """Remove an empty directory below the top."""
    above, _, name = path.rpartition("/")
    with Closing(_enter(top, above)) as parent:
        os.rmdir(name, dir_fd=parent)


def _is_roots(directory: int, name: str, user: int) -> bool:
    """Whether root owns an entry, not the user. Raises OSError if root must not remove it."""
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if status.st_uid == user:
        return False
    # A killed start may have created these, and not handed them over yet.
    empty = stat.S_ISREG(status.st_mode) and status.st_size == 0
    if status.st_uid != _ROOT or not (empty or stat.S_ISDIR(status.st_mode)):
        raise _foreign()
    return True


def _foreign() -> OSError:
    return PermissionError(errno.EPERM, "it contains an entry that belongs to another user")


def is_entry(opened: int, directory: int, name: str) -> bool:
    """Whether a name in a directory still refers to an open file or directory."""
    try:
        there = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(opened), there)
