"""What a person at a terminal sees while something long goes on."""

from __future__ import annotations

from contextlib import AbstractContextManager

from rich.console import Console

from pgtemp.host import progress


def show_progress() -> None:
    """Show steps with a spinner, on a terminal only."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return

    def show(text: str) -> AbstractContextManager[object]:
        return console.status(f"{text} …")

    progress.show_with(show)
