"""The commands, put together. `pgtemp URI` is `pgtemp serve URI`."""

from __future__ import annotations

import difflib

import click

from pgtemp.cli.doctor import doctor
from pgtemp.cli.machine import ls, sweep
from pgtemp.cli.open import open_kept
from pgtemp.cli.run import run, shell
from pgtemp.cli.serve import serve


class _ServeByDefault(click.Group):
    """A group whose arguments are those of `serve` unless they name another command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = [*self.commands, "--help", "-h", "--version"]
        if not args or args[0] not in known:
            if args and args[0].isalnum():
                meant = difflib.get_close_matches(args[0], self.commands, n=1)
                hint = f"did you mean {meant[0]}?" if meant else "a URI begins with postgresql://"
                ctx.fail(f"there is no command {args[0]!r}; {hint}")
            args = ["serve", *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=_ServeByDefault,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="pgtemp COMMAND --help tells the options of a command.",
)
@click.version_option(package_name="pgtemp", prog_name="pgtemp")
def cli() -> None:
    """Real, temporary PostgreSQL databases for tests.

    \b
    pgtemp postgresql://localhost:6543/mytestdb
        every connection to this URL gets a database of its own, new and empty,
        gone when the connection ends (the same as `pgtemp serve URL`);
        /mytestdb~word is shared by all that name the word,
        /mytestdb~template is the template, to migrate it
    pgtemp --single postgresql://localhost:6543/mytestdb
        all connections share one server, gone when pgtemp ends
    pgtemp --load-from dump.sql postgresql://localhost:6543/mytestdb
        every database starts with this dump loaded
    pgtemp --persist postgresql://localhost:6543/mytestdb
        data directories are kept; `pgtemp open DIR` starts one again

    pgtemp run -- COMMAND, pgtemp shell
        a server for one command, or for psql, gone when it ends

    \b
    pgtemp ls, pgtemp sweep, pgtemp doctor
        who has servers here; what is left of those who are gone; what is in the way

    Give the URL to your tests as DATABASE_URL. Ctrl-C ends everything.
    """


cli.add_command(serve)
cli.add_command(run)
cli.add_command(shell)
cli.add_command(open_kept)
cli.add_command(ls)
cli.add_command(sweep)
cli.add_command(doctor)
