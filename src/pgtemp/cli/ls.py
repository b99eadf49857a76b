"""`pgtemp ls`: list the owners of servers on this machine, and leftovers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from pgtemp.cli import show
from pgtemp.cli.sweep import described, directories_argument
from pgtemp.daemon import running_owners
from pgtemp.host import identity
from pgtemp.supervisor import inventory


@click.command()
@directories_argument
@show.as_json
def ls(directories: Sequence[Path], json_wanted: bool) -> int:
    """List the owners of servers on this machine: daemons, test runs, programs.

    The list ends with the leftovers of owners that have exited. DIRECTORIES are also searched for
    leftovers; specify those used as data_dir_prefix.
    """
    every = inventory.run_directories(directories)
    found = running_owners.of(every)
    left = [one for one in every if not one.lives]
    closed = [one for one in every if not one.open]
    if json_wanted:
        show.json_object(
            {
                "owners": [asdict(one) for one in found],
                "left": [described(one) for one in left],
                "closed": [str(one.path) for one in closed],
            }
        )
        return 0
    if found:
        titles = "PID", "USER", "AGE", "SERVERS", "DATABASES", "LEASES", "SIZE", "COMMAND"
        show.table(titles, [_row(one) for one in found])
    else:
        click.echo("there are no servers on this machine")
    if closed:
        users = show.plain(", ".join(sorted({identity.name_of(one.uid) for one in closed})))
        click.echo(f"{len(closed)} directories of other users ({users}) cannot be read")
    if left:
        size = show.size(sum(one.size for one in left))
        click.echo(
            f"{len(left)} directories ({size}) were left by owners that have exited; "
            "remove them with pgtemp sweep"
        )
    return 0


def _row(one: running_owners.Owner) -> Sequence[str]:
    leases = str(len(one.leases)) if one.leases is not None else ""
    return (
        str(one.pid or "?"), one.user, show.age(one.age), str(one.servers),
        str(one.databases), leases, show.size(one.size), one.command,
    )  # fmt: skip
