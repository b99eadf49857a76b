"""`pgtemp open DIR`: run a server on persisted data."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import click

from pgtemp.allocation.persisted import PersistedDB, act_as_owner
from pgtemp.cli import show


@click.command("open")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("-d", "--dbname", default=None, help="the database, if several were persisted")
@click.option("--port", type=int, default=None, help="TCP port (default: a free port)")
@click.option("--bin-dir", default=None, help="directory of PostgreSQL's programs [PGTEMP_BIN]")
def open_persisted(
    directory: Path, dbname: str | None, port: int | None, bin_dir: str | None
) -> int:
    """Run a server on a persisted data directory until Ctrl-C. The directory is not removed."""
    show.steps()
    stop = threading.Event()
    numbers: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        numbers.append(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    bin_dir = bin_dir or os.environ.get("PGTEMP_BIN")
    act_as_owner(directory)
    with PersistedDB(directory, dbname=dbname, port=port, bin_dir=bin_dir) as persisted:
        click.echo(f"PostgreSQL {persisted.version} serves {persisted.directory} at")
        click.echo(f"    {persisted.info.uri}")
        for name, origin in persisted.note.databases.items():
            click.echo(f"database {name} belongs to {origin}")
        click.echo("Ctrl-C stops the server; the directory remains")
        stop.wait()
    return 130 if signal.SIGINT in numbers else 0
