"""One run of tests, and the identity of this process in it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """One run of tests.

    Attributes:
        name: unique to this run.
        worker: identifies this process; None if the run has only one process.
    """

    name: str
    worker: str | None = None


def new_name() -> str:
    """Return a name for a run; names of later runs sort after it."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
