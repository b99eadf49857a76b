"""How many files, sockets among them, this process may have open."""

from __future__ import annotations

import resource
from contextlib import suppress

_MOST = 65536  # enough, and children that go through all of theirs do not take long


def raise_limit() -> None:
    """As many as the system lets this user have: the usual 1024 are 500 clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # a system that allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def limit() -> int:
    """How many there may be."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else soft
