"""`pgtemp run COMMAND` and `pgtemp shell`: a server that runs as long as one command."""

from __future__ import annotations

import os
import resource
import secrets
import signal
from collections.abc import Callable, Sequence
from typing import Any

import click

from pgtemp import libpq
from pgtemp.cli import show
from pgtemp.cli.flags import flags_of, values_given
from pgtemp.host import foreground
from pgtemp.options.server import ServerOptions
from pgtemp.pgtempdb import PgTempDB

# The exit statuses of the shell, env and timeout.
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126
_TAKES_A_COMMAND = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def _server_flags(command: Callable[..., object]) -> Callable[..., object]:
    for name, kind, text in (
        ("--dbname", str, "the database (default postgres)"),
        ("--user", str, "the name of the superuser (default postgres)"),
        ("--port", int, "TCP port (default: a free port)"),
    ):
        command = click.option(name, type=kind, default=None, help=text)(command)
    return flags_of(ServerOptions, leave_out=("tcp",))(command)


@click.command(context_settings=_TAKES_A_COMMAND)
@_server_flags
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(command: Sequence[str], **given: Any) -> int:
    """Run a command with a server of its own, which is removed when the command exits.

    The command gets the server's address in DATABASE_URL, PGHOST, PGPORT, PGUSER, PGPASSWORD and
    PGDATABASE. pgtemp forwards signals to it, and exits with its exit status.

    \b
        pgtemp run -- npm test
        pgtemp run --load-from schema.sql -- cargo test
    """
    return _run(lambda db: command, given)


@click.command(context_settings=_TAKES_A_COMMAND)
@_server_flags
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def shell(arguments: Sequence[str], **given: Any) -> int:
    """Run psql in a new database, which is removed when psql exits.

    \b
        pgtemp shell
        pgtemp shell --load-from dump.sql -- -c 'select count(*) from account'
    """
    return _run(lambda db: [str(db.installation.program("psql")), *arguments], given)


def _run(command: Callable[[PgTempDB], Sequence[str]], given: dict[str, Any]) -> int:
    show.steps()
    # PgTempDB hashes a random password with one iteration, which Java clients refuse. A given
    # password is hashed with PostgreSQL's number of iterations.
    options = ServerOptions(password=secrets.token_hex(16), **values_given(given))
    with PgTempDB.with_options(options) as db:
        argv = command(db)
        try:
            status = foreground.run(argv, libpq.child_environment(db.info))
        except FileNotFoundError:
            click.echo(f"pgtemp: command {argv[0]!r} not found", err=True)
            status = _NOT_FOUND
        except OSError as error:
            click.echo(f"pgtemp: {argv[0]!r} cannot be run: {error.strerror}", err=True)
            status = _NOT_EXECUTABLE
    if options.persist:
        click.echo(f"persisted {db.data_dir.parent}", err=True)
    if status < 0:
        _die_by(-status)
    return status


def _die_by(number: int) -> None:
    """Terminate this process with the signal that ended the command, for a shell or make to see."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
