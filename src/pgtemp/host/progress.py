"""Report the start of slow operations.

The library calls `with step("initdb ...")`; a command that has a terminal displays the text. By
default the text is only logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

_log = logging.getLogger("pgtemp")
_show: Callable[[str], AbstractContextManager[object]] = nullcontext


def show_with(show: Callable[[str], AbstractContextManager[object]]) -> None:
    """Set the context manager that displays a step while it runs."""
    global _show
    _show = show


@contextmanager
def step(text: str) -> Iterator[None]:
    """Log a slow operation, and display it while the block runs."""
    _log.info("%s", text)
    with _show(text):
        yield
