"""Progress of long operations, shown at a terminal."""

from __future__ import annotations

from contextlib import AbstractContextManager

from rich.console import Console

from pgtemp.host import progress


def show_progress() -> None:
    """Show each step with a spinner, if standard error is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return

    def show(text: str) -> AbstractContextManager[object]:
        return console.status(f"{text} …")

    progress.show_with(show)
