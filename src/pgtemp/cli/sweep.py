"""`pgtemp sweep`: remove the leftovers of owners that have exited."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pgtemp.cli import show
from pgtemp.host import identity
from pgtemp.images import cache
from pgtemp.supervisor import inventory
from pgtemp.supervisor.inventory import Found, Swept

directories_argument = click.argument(
    "directories", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path)
)


@click.command()
@directories_argument
@click.option("--dry-run", is_flag=True, help="list the leftovers without removing them")
@show.as_json
def sweep(directories: Sequence[Path], dry_run: bool, json_wanted: bool) -> int:
    """Remove the leftovers of owners that have exited: processes, directories, shared memory.

    Each start of a server also removes leftovers in the directory in which it creates its run
    directory. DIRECTORIES are also searched; specify those used as data_dir_prefix. Run directories
    in use and persisted data are not removed.

    A directory that the system does not let you remove (of another user, immutable, mounted) is
    left alone, and the reason is printed; this is not an error. If the removal of a directory that
    you own fails for another reason, the exit status is 1.
    """
    found, failed = [], False
    for one in inventory.run_directories(directories):
        if one.lives:
            continue
        facts = described(one)
        swept = None if dry_run else one.sweep()
        facts["removed"] = swept is not None and swept.removed
        if swept is not None:
            facts |= {"reason": swept.reason, "failed": swept.failed}
            failed = failed or swept.failed
        found.append(facts)
        if not json_wanted:
            _print_swept(facts, swept)
    caches = [] if dry_run else [str(path) for path in cache.sweep()]
    if json_wanted:
        show.json_object({"found": found, "cache": caches, "dry_run": dry_run})
    else:
        for path in caches:
            click.echo(f"removed {show.plain(str(path))}, which was left incomplete")
        if not found and not caches:
            click.echo("there are no leftovers")
    return 1 if failed else 0


def _print_swept(facts: dict[str, Any], swept: Swept | None) -> None:
    if swept is None:
        word = "found"
    elif swept.removed:
        word = "kept the data of" if facts["keep"] else "removed"
    else:
        word = "could not remove" if swept.failed else "left alone"
    processes = f", {len(facts['processes'])} processes" if facts["processes"] else ""
    line = f"{word} {facts['path']} ({show.size(facts['bytes'])}{processes}, of {facts['user']})"
    reason = f": {swept.reason}" if swept is not None and swept.reason is not None else ""
    click.echo(show.plain(line + reason))


def described(one: Found) -> dict[str, Any]:
    """The properties of a leftover, for JSON."""
    return {
        "path": str(one.path),
        "user": identity.name_of(one.uid),
        "bytes": one.size,
        "processes": list(one.processes),
        "keep": one.keep,
    }
