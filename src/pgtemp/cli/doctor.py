"""`pgtemp doctor`: check that servers can run on this machine."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import click
from rich.console import Console

from pgtemp.cli import show
from pgtemp.cli.flags import flags_of, values_given
from pgtemp.doctor import Check, examine
from pgtemp.options.server import ServerOptions

_TAKEN = ("bin_dir", "version", "run_as", "data_dir_prefix")
_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}
_INDENT = " " * 22


@click.command()
@flags_of(ServerOptions, leave_out={one.name for one in fields(ServerOptions)} - {*_TAKEN})
@show.as_json
def doctor(json_wanted: bool, **given: Any) -> int:
    """Check everything that servers need on this machine.

    Each check prints a verdict and, if it did not pass, a remedy. One check starts a server. The
    exit status is 1 if a check fails.
    """
    show.steps()
    console = Console(highlight=False, soft_wrap=True)
    checks = []
    for check in examine(ServerOptions(**values_given(given))):
        checks.append(check)
        if not json_wanted:
            _print(console, check)
    failed = any(check.verdict == "failed" for check in checks)
    if json_wanted:
        show.json_object({"ok": not failed, "checks": [asdict(check) for check in checks]})
    return 1 if failed else 0


def _print(console: Console, check: Check) -> None:
    first, *more = show.plain_lines(check.found).split("\n")
    colour = _COLOURS[check.verdict]
    console.print(f"[{colour}]{check.verdict:9}[/] [bold]{check.name:11}[/] ", end="")
    console.print(first, markup=False)
    for line in more:
        console.print(_INDENT + line, markup=False)
    if check.cure:
        console.print(f"{_INDENT}[bold]cure:[/] ", end="")
        console.print(show.plain_lines(check.cure), markup=False)
