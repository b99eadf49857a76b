"""Open files relative to directory descriptors, one name at a time, without following links.

The supervisor process imports this module, so it imports no module that is slow to import.
"""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# Enough to open the entries of a directory without permission to list it (macOS has no O_PATH).
PASSAGE = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Closing:
    """A descriptor that is closed at the end of a `with` block."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def open_file(name: str, directory: int) -> int:
    """Open a regular file for reading and return its descriptor.

    Raises OSError if the file cannot be opened; FileNotFoundError if it is not a regular file.
    """
    file = os.open(name, READ, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FileNotFoundError(name)
    return file


def open_passage(path: str) -> int:
    """Open a directory in order to open its entries later; no part of `path` may be a link.

    `path` is absolute. Raises OSError.
    """
    return descend(os.open("/", PASSAGE), filter(None, path.split("/")), PASSAGE)


def descend(here: int, names: Iterable[str], flags: int = DIRECTORY) -> int:
    """Open a directory below an open one, which is closed, one name at a time. Raises OSError."""
    for name in names:
        with Closing(here):
            here = os.open(name, flags, dir_fd=here)
    return here


def quietly(do: Callable[..., object], *arguments: object, **named: object) -> None:
    """Call a function and ignore an OSError: the work may be done already, or not be permitted."""
    try:
        do(*arguments, **named)
    except OSError:
        pass
