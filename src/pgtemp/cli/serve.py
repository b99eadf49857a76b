"""`pgtemp serve URI`: the daemon."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from contextlib import suppress
from typing import Any

import click

from pgtemp.cli import logs, show
from pgtemp.cli.flags import flags_of, values_given
from pgtemp.daemon.daemon import Announcement, exit_status, run
from pgtemp.errors import OptionError
from pgtemp.host import ports
from pgtemp.options.daemon import DEFAULT_HOST, DEFAULT_PORT, DaemonOptions
from pgtemp.uri import parse, redact

_DEFAULT_URI = f"postgresql://{DEFAULT_HOST}:{DEFAULT_PORT}/postgres"


@click.command()
@click.argument("uri", required=False)
@flags_of(DaemonOptions)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="level of the log on standard error (default warning, or info with --log-json); "
    "info logs one line per lease",
)
@click.option("--log-json", is_flag=True, help="log one JSON object per line")
def serve(uri: str | None, log_level: str | None, log_json: bool, **given: Any) -> int:
    """Serve temporary databases at URI; every connection gets its own.

    The default of URI is PGTEMP_URI, else DATABASE_URL, else
    postgresql://localhost:6543/postgres. The servers are created with its user and database.
    """
    # Until the daemon installs its handlers, a signal may terminate the process: nothing is started
    # yet.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    logs.set_up(log_level or ("info" if log_json else "warning"), as_json=log_json)
    options = _options(uri, given)
    show.steps()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        number = runner.run(run(options, ready=_print_ready, announce=_print_line))
    return exit_status(number)


def _options(uri: str | None, given: dict[str, Any]) -> DaemonOptions:
    source = "URI"
    for variable in ("PGTEMP_URI", "DATABASE_URL"):
        if not uri and (uri := os.environ.get(variable)):
            source = variable
    uri = uri or _DEFAULT_URI
    parsed = parse(uri, source)
    host = parsed.host or DEFAULT_HOST
    if host.startswith("/") or not ports.loopback_addresses(host):
        raise OptionError(
            f"{redact(uri)!r}: {host} is not this machine",
            remedy="use localhost; to serve other machines, use --listen",
        )
    named = {
        name: value
        for name in ("port", "user", "password", "dbname")
        if (value := getattr(parsed, name)) is not None
    }
    return DaemonOptions(host=host, **named, **values_given(given))


def _print_line(text: str) -> None:
    with suppress(OSError):  # such as a full disk; the daemon's work is more important
        click.echo(text, err=True)


def _print_ready(served: Announcement) -> None:
    click.echo(f"pgtemp serves PostgreSQL {served.version}, {served.each}, at")
    click.echo(f"    {served.info.uri}")
    click.echo("try it with")
    click.echo(f"    {served.psql} {shlex.quote(served.info.uri)} -c 'select version()'")
    if served.root is not None:
        click.echo(f"to verify its TLS certificate, connect with sslrootcert={served.root}")
    click.echo(f"the unix socket is in {served.socket_dir}; Ctrl-C stops everything")


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:  # no wheel for this Python; asyncio's own loop also works, but is slower
        return None
    return uvloop.new_event_loop
