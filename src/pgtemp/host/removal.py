"""Remove directories, one entry per step, in a tree that another user may change meanwhile.

The supervisor process imports this module, so it imports no module that is slow to import.
"""

from __future__ import annotations

import errno
import os

from pgtemp.host.openat import DIRECTORY, quietly

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    StrPath = str | os.PathLike[str]
    # Work in small steps; the generator's result is the first failure, or None.
    Steps = Generator[None, None, OSError | None]

ASIDE = ".gone"  # suffix of the name of a directory that is being removed


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
    try:
        yield from removal_at(parent, name)
    finally:
        os.close(parent)


def removal_at(parent: int, name: str) -> Iterator[None]:
    """Remove an entry of an open directory in steps; never follows a link, and never raises."""
    try:
        top = os.open(name, DIRECTORY, dir_fd=parent)
    except OSError:
        quietly(os.unlink, name, dir_fd=parent)
        return
    try:
        yield from remove_open(parent, name, top)
    finally:
        os.close(top)


def remove_open(parent: int, name: str, top: int) -> Steps:
    """Remove an open directory and its contents; the result is the first failure, if it remains.

    If another directory has that name by now, it is not removed.
    """
    failure = yield from _empty(top)
    try:
        if is_entry(top, parent, name):
            os.rmdir(name, dir_fd=parent)
    except OSError as error:
        return failure or error
    return None


def _empty(top: int) -> Steps:
    """Remove the contents of a directory; the result is the first failure.

    It works through descriptors, so a user who can write to the directory cannot redirect a removal
    by root. Every subdirectory is moved to the top before it is emptied, so the removal does not
    recurse and needs two descriptors, however deep the tree is. Mounted file systems are not
    emptied: a deeper mount point cannot be moved, and one at the top is recognized by its device.
    """
    failure: OSError | None = None
    device = os.fstat(top).st_dev
    waiting = [""]
    while waiting:
        name = waiting.pop()
        try:
            here = os.open(name, DIRECTORY, dir_fd=top) if name else os.dup(top)
        except OSError as error:
            failure = failure or error
            continue
        try:
            if os.fstat(here).st_dev != device:
                raise OSError(errno.EBUSY, "a file system is mounted in it")
            with os.scandir(here) as entries:
                found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
            for child, is_dir in found:
                try:
                    if not is_dir:
                        os.unlink(child, dir_fd=here)
                    elif not name:
                        waiting.append(child)
                    else:
                        # A name that another user cannot predict, and so cannot occupy.
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
            if name:
                quietly(os.rmdir, name, dir_fd=top)
    return failure


def is_entry(opened: int, directory: int, name: str) -> bool:
    """Whether a name in a directory still refers to an open file or directory."""
    try:
        there = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(opened), there)
