"""Telling whoever watches that something long is going on.

The core says `with step("initdb …")`; a command line that has a terminal shows it. Nobody
listening is the normal case.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

_log = logging.getLogger("pgtemp")
_show: Callable[[str], AbstractContextManager[object]] | None = None


def show_with(show: Callable[[str], AbstractContextManager[object]] | None) -> None:
    """Name what shows a step while it lasts."""
    global _show
    _show = show


@contextmanager
def step(text: str) -> Iterator[None]:
    """A stretch of work that a person would wonder about."""
    _log.info("%s", text)
    if _show is None:
        yield
        return
    with _show(text):
        yield
