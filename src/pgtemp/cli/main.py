"""Run the command line, and report every error by one line and an exit status."""

from __future__ import annotations

import os
import signal
import sys

from pgtemp.host import pid1

USAGE_ERROR, INTERRUPTED = 2, 130


def main() -> None:
    """Run the command line without tracebacks.

    The exit status is 2 for pgtemp's errors and for wrong usage, and 130 for Ctrl-C.
    """
    _open_standard_streams()
    # As long as no cleanup is needed, Ctrl-C terminates the process directly: a KeyboardInterrupt
    # during imports may be raised in a callback that ignores it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        sys.exit(pid1.run(_run))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _open_standard_streams() -> None:
    """Open /dev/null for each closed standard stream: uvloop aborts if it gets its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # returns the lowest unused number


def _run() -> int:
    # Import these here, because Ctrl-C may be pressed during the imports.
    import click

    from pgtemp.cli import show
    from pgtemp.cli.group import cli
    from pgtemp.errors import PgTempError

    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        return cli.main(prog_name="pgtemp", standalone_mode=False) or 0
    except PgTempError as error:
        click.echo(f"pgtemp: {show.plain_lines(str(error))}", err=True)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "pgtemp"
        message = error.format_message().rstrip(".")
        click.echo(f"pgtemp: {show.plain_lines(message)}; see {command} --help", err=True)
    except OSError as error:
        click.echo(f"pgtemp: {show.plain_lines(str(error))}", err=True)
    except click.Abort:
        return INTERRUPTED
    return USAGE_ERROR
