"""A table of measurements: medians, spread, and ratios to a base; printed or saved."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import sys
from pathlib import Path


class Failed(Exception):  # noqa: N818
    """The reason why a measurement failed, in one line."""


def machine(module: str, release: str) -> str:
    """A description of the machine, and the command line of the run.

    Args:
        release: of PostgreSQL.
    """
    return (
        f"{os.cpu_count()} cores, Linux {platform.release()}, PostgreSQL {release}, "
        f"Python {platform.python_version()}, data on tmpfs, {datetime.date.today()}: "
        f"`python -m {module} {shlex.join(sys.argv[1:])}`."
    )


class Table:
    """Samples by name, in milliseconds unless the title says otherwise, and failed measurements."""

    def __init__(self, title: str, *, more_is_better: bool = False) -> None:
        self.title = title
        self._more_is_better = more_is_better
        self._samples: dict[str, list[float]] = {}
        self._failed: dict[str, str] = {}

    def add(self, name: str, sample: float | str) -> None:
        if isinstance(sample, str):
            self._failed[name] = sample
        else:
            self._samples.setdefault(name, []).append(sample)

    def show(self, base: str) -> None:
        """Print it. The ratio is the time relative to `base`."""
        print(f"\n{self.title}\n{'':40}{'median':>9}{'min':>8}{'max':>8}{'ratio':>8}")
        unit = statistics.median(self._samples[base]) if base in self._samples else None
        for name, samples in self._samples.items():
            middle = statistics.median(samples)
            ratio = f"{middle / unit:8.2f}" if unit else f"{'':8}"
            print(f"{name:40}{middle:9.1f}{min(samples):8.1f}{max(samples):8.1f}{ratio}")
        for name, reason in self._failed.items():
            print(f"{name:40} did not work: {' '.join(reason.split())[:120]}")

    def save(self, directory: Path, name: str, base: str, description: str) -> None:
        """Write it to a file, for docs/peers.py.

        Args:
            description: of the machine, and the command line of the run.
        """
        content = {
            "told": description,
            "title": self.title,
            "more is better": self._more_is_better,
            "base": base,
            "samples": {way: [round(one, 3) for one in s] for way, s in self._samples.items()},
            "failed": self._failed,
        }
        (directory / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
