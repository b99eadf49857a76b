"""Print the results and the progress of commands: text for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pgtemp.host import progress

_WIDTH = 200  # characters per line, if the output is not a terminal

as_json = click.option(
    "--json", "json_wanted", is_flag=True, help="print the result as one JSON object"
)


def steps() -> None:
    """Show each long operation with a spinner, if standard error is a terminal."""
    console = Console(stderr=True)
    if console.is_terminal:
        progress.show_with(lambda text: console.status(f"{text} …"))


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; a column whose cells all start with a digit is right-aligned."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column, title in enumerate(titles):
        numbers = all(row[column].replace(" ", "")[:1].isdigit() for row in rows)
        shown.add_column(title, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(plain(cell)) for cell in row))
    console.print(shown)


def plain(text: str) -> str:
    """Escape a text of other users: characters that control a terminal or cannot be encoded.

    These include line breaks, marks that change the direction of text, and bytes of a name that are
    not valid UTF-8.
    """
    shown = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def plain_lines(text: str) -> str:
    """Like `plain`, for a text of several lines, whose line breaks are preserved."""
    return "\n".join(plain(line.expandtabs()) for line in text.split("\n"))


def json_object(result: dict[str, Any]) -> None:
    """Print an object as ASCII, which every terminal and encoding supports."""
    click.echo(json.dumps(result, indent=2, allow_nan=False))


def size(count: int) -> str:
    """Format a number of bytes for people."""
    if count < 1 << 20:
        return f"{count >> 10} kB"
    return f"{count >> 20} MB" if count < 10 << 30 else f"{count >> 30} GB"


def age(seconds: float | None) -> str:
    """Format a number of seconds for people."""
    if seconds is None:
        return "?"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
