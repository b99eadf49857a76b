"""Opening files by descriptors, one name at a time, without following links.

The supervisor's process imports this too, so it imports nothing that is slow.
"""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# Enough to open what is below a directory, without the right to list it (macOS has no O_PATH).
PASSAGE = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_file(name: str, directory: int) -> int:
    """A descriptor of a regular file, for reading.

    Raises:
        OSError: it is missing; FileNotFoundError if it is of another kind.
    """
    file = os.open(name, READ, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FileNotFoundError(name)
    return file


def open_passage(path: str) -> int:
    """A descriptor for opening the entries of a directory; no part of `path` may be a link.

    `path` is absolute. Raises OSError.
    """
    here = os.open("/", PASSAGE)
    for name in filter(None, path.split("/")):
        try:
            below = os.open(name, PASSAGE, dir_fd=here)
        finally:
            os.close(here)
        here = below
    return here


def quietly(do: Callable[..., object], *arguments: object, **named: object) -> None:
    """Call something that may have been done already, or that the caller may not do."""
    try:
        do(*arguments, **named)
    except OSError:
        pass
