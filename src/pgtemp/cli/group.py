"""The group of all commands. `pgtemp URI` is `pgtemp serve URI`."""

from __future__ import annotations

import difflib

import click

from pgtemp.cli.doctor import doctor
from pgtemp.cli.ls import ls
from pgtemp.cli.open import open_persisted
from pgtemp.cli.run import run, shell
from pgtemp.cli.serve import serve
from pgtemp.cli.sweep import sweep


class _ServeByDefault(click.Group):
    """A group that passes its arguments to `serve` unless they name another command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = [*self.commands, "--help", "-h", "--version"]
        if not args or args[0] not in known:
            if args and args[0].isalnum():
                close = difflib.get_close_matches(args[0], self.commands, n=1)
                hint = f"did you mean {close[0]}?" if close else "a URI begins with postgresql://"
                ctx.fail(f"unknown command {args[0]!r}; {hint}")
            args = ["serve", *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=_ServeByDefault,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Run pgtemp COMMAND --help for the options of a command.",
)
@click.version_option(package_name="pgtemp", prog_name="pgtemp")
def cli() -> None:
    """Real, temporary PostgreSQL databases for tests.

    \b
    pgtemp postgresql://localhost:6543/mytestdb
        every connection to this URL gets its own new, empty database, which is
        dropped when the connection closes (the same as `pgtemp serve URL`);
        connections to /mytestdb~word share one database, for any word;
        connect to /mytestdb~template to edit the template, for example to migrate it
    pgtemp --single postgresql://localhost:6543/mytestdb
        all connections share one server, which is removed when pgtemp exits
    pgtemp --load-from dump.sql postgresql://localhost:6543/mytestdb
        every database starts with this dump loaded
    pgtemp --persist postgresql://localhost:6543/mytestdb
        data directories are persisted; `pgtemp open DIR` starts a server on one

    \b
    pgtemp run -- COMMAND, pgtemp shell
        run one command, or psql, with a server that is removed afterwards

    \b
    pgtemp ls, pgtemp sweep, pgtemp doctor
        list the owners of servers on this machine; remove leftovers of owners that
        have exited; check that servers can run here

    Give the URL to your tests as DATABASE_URL. Ctrl-C stops the daemon and all its servers.
    """


for command in (serve, run, shell, open_persisted, ls, sweep, doctor):
    cli.add_command(command)
