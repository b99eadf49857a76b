"""A table of measurements: medians, spread, and ratios to one of them."""

from __future__ import annotations

import statistics


class Table:
    """Samples in milliseconds by name; a way that did not work says why."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._samples: dict[str, list[float]] = {}
        self._failed: dict[str, str] = {}

    def add(self, name: str, sample: float | str) -> None:
        if isinstance(sample, str):
            self._failed[name] = sample
        else:
            self._samples.setdefault(name, []).append(sample)

    def show(self, base: str) -> None:
        """Print it; the ratio is how many times as long as `base` a way takes."""
        print(f"\n{self.title}\n{'':40}{'median':>9}{'min':>8}{'max':>8}{'ratio':>8}")
        unit = statistics.median(self._samples[base])
        for name, samples in self._samples.items():
            middle = statistics.median(samples)
            print(
                f"{name:40}{middle:9.1f}{min(samples):8.1f}{max(samples):8.1f}{middle / unit:8.2f}"
            )
        for name, reason in self._failed.items():
            print(f"{name:40} did not work: {reason[:120]}")
