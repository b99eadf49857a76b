"""`pgtemp open DIR`: look at data that was kept."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import click

from pgtemp.allocation.persisted import PersistedDB, act_as_owner
from pgtemp.cli.progress import show_progress


@click.command("open")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("-d", "--dbname", default=None, help="the database, where several were kept")
@click.option("--port", type=int, default=None, help="TCP port; a free one by default")
@click.option("--bin-dir", default=None, help="folder of PostgreSQL's programs [PGTEMP_BIN]")
def open_kept(directory: Path, dbname: str | None, port: int | None, bin_dir: str | None) -> int:
    """Start a server again on a data directory that was kept, until Ctrl-C; it stays kept."""
    show_progress()
    stop = threading.Event()
    numbers: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        numbers.append(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    bin_dir = bin_dir or os.environ.get("PGTEMP_BIN")
    act_as_owner(directory)
    with PersistedDB(directory, dbname=dbname, port=port, bin_dir=bin_dir) as kept:
        click.echo(f"{kept.directory} is served by PostgreSQL {kept.version} at")
        click.echo(f"    {kept.info.uri}")
        for name, of in kept.note.databases.items():
            click.echo(f"{name} is of {of}")
        click.echo("Ctrl-C ends it; the directory stays")
        stop.wait()
    return 130 if signal.SIGINT in numbers else 0
