"""Run the command line: errors become one line and an exit status, in this one place."""

from __future__ import annotations

import os
import signal
import sys

from pgtemp.host import pid1

USAGE_ERROR, INTERRUPTED = 2, 130


def main() -> None:
    """Never a traceback: an error of ours or a wrong word is status 2, Ctrl-C is 130."""
    _fill_gaps()
    # While nothing has to be undone, Ctrl-C just ends this: a KeyboardInterrupt amid imports may
    # fall into a callback that swallows it.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        sys.exit(pid1.run(_run))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _fill_gaps() -> None:
    """Take the numbers of standard streams that are closed; uvloop aborts where it gets one."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def _run() -> int:
    # Imported here, because Ctrl-C may come while the imports go on.
    import click

    from pgtemp.cli import show
    from pgtemp.cli.group import cli
    from pgtemp.errors import PgTempError
    from pgtemp.host.processes import LEADS_ELSEWHERE

    for name in LEADS_ELSEWHERE:
        os.environ.pop(name, None)
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
