"""Output at pytest's terminal."""

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
    """Print a line at the start of each long operation, such as the first initdb.

    Args:
        terminal: pytest's terminal reporter, whose output is not captured.
    """

    @contextmanager
    def show(text: str) -> Iterator[None]:
        terminal.ensure_newline()
        terminal.write_line(f"pgtemp: {text} …")
        yield

    progress.show_with(show)


def close(suite: Suite, config: Any) -> None:
    """Stop a suite's servers. If data could not be persisted, print the error and continue."""
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
    """Return each test and the command that opens its database, from the reports' properties."""
    found: dict[tuple[str, str], None] = {}
    for reports in terminal.stats.values():
        for report in reports:
            for key, value in getattr(report, "user_properties", ()):
                if key == name:
                    found[report.nodeid, value] = None
    return list(found)
