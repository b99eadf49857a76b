"""Removing directories, one entry a step, in a tree that another user may change meanwhile.

The supervisor's process imports this too, so it imports nothing that is slow.
"""

from __future__ import annotations

import errno
import os

from pgtemp.host.openat import DIRECTORY, quietly

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    StrPath = str | os.PathLike[str]
    # Work in small steps; its result says what failed.
    Steps = Generator[None, None, OSError | None]

ASIDE = ".gone"  # ends the name of a directory that is being removed


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


def removal_at(parent: int, name: str) -> Iterator[None]:
    """Remove a name in an open directory, one entry a step; never follows a link, never fails."""
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
    """Remove an open directory and all that is in it; the first failure, if it remains.

    A directory that has taken its name since stays.
    """
    failure = yield from _empty(top)
    try:
        if is_entry(top, parent, name):
            os.rmdir(name, dir_fd=parent)
    except OSError as error:
        return failure or error
    return None


def _empty(top: int) -> Steps:
    """Remove all that is in a directory; the first failure.

    By descriptors: whoever may write to it cannot lead a removal by root elsewhere. A directory
    that is not empty is moved up to the top before it is looked into, so that however deep a tree
    is, nothing recurses and two descriptors are enough. A file system that is mounted below stays:
    what is mounted deeper cannot be moved, and what is mounted at the top is another device.
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
            if name:
                quietly(os.rmdir, name, dir_fd=top)
    return failure


def is_entry(opened: int, directory: int, name: str) -> bool:
    """Whether an open file or directory still has that name."""
    try:
        there = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(opened), there)
