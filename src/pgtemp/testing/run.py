"""One run of tests, and which of its processes this is."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """One run of tests.

    Attributes:
        name: nobody else's.
        worker: which of several processes this is; None where it is the only one.
    """

    name: str
    worker: str | None = None


def new_name() -> str:
    """A name for a run; later ones sort behind."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
