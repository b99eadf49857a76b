"""The limit on open files, including sockets, of this process."""

from __future__ import annotations

import resource
from contextlib import suppress

_MAX_FILES = 65536  # enough; child processes can still close every descriptor quickly


def raise_limit() -> None:
    """Raise the soft limit as far as the hard limit allows: the usual 1024 allow 500 clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # some systems allow less than the hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def limit() -> int:
    """The current soft limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_FILES if soft == resource.RLIM_INFINITY else soft
