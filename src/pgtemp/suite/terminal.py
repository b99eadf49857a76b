"""What a person at pytest's terminal sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pgtemp.host import progress


def show_steps(terminal: Any) -> None:
    """Show what takes long, such as the first initdb, as it begins.

    Args:
        terminal: pytest's terminal reporter, which writes past the capturing of output.
    """

    @contextmanager
    def show(text: str) -> Iterator[None]:
        terminal.ensure_newline()
        terminal.write_line(f"pgtemp: {text} …")
        yield

    progress.show_with(show)


def commands_in(terminal: Any, name: str) -> list[tuple[str, str]]:
    """Each test with a command that opens its database, from the reports' properties."""
    found: dict[tuple[str, str], None] = {}
    for reports in terminal.stats.values():
        for report in reports:
            for key, value in getattr(report, "user_properties", ()):
                if key == name:
                    found[report.nodeid, value] = None
    return list(found)
