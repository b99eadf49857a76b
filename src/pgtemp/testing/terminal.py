"""What a person at pytest's terminal sees."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pgtemp.errors import PgTempError
from pgtemp.host import progress

if TYPE_CHECKING:
    from pgtemp.testing.suite import Suite


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


def close(suite: Suite, config: Any) -> None:
    """End a suite's servers; what could not be kept is said, and changes nothing else."""
    try:
        suite.close()
    except PgTempError as error:
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None:
            print(f"pgtemp: {error}", file=sys.stderr)  # noqa: T201
        else:
            terminal.ensure_newline()
            terminal.write_line(f"pgtemp: {error}")


def commands_in(terminal: Any, name: str) -> list[tuple[str, str]]:
    """Each test with a command that opens its database, from the reports' properties."""
    found: dict[tuple[str, str], None] = {}
    for reports in terminal.stats.values():
        for report in reports:
            for key, value in getattr(report, "user_properties", ()):
                if key == name:
                    found[report.nodeid, value] = None
    return list(found)
