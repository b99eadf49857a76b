"""What a suite of tests is run with, beyond what servers are made with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any

from pgtemp.options.server import ServerOptions, option

ISOLATIONS = ("database", "cluster")
# What a suite decides by itself, or what workers side by side cannot share.
_NOT_FOR_SUITES = frozenset(
    ("port", "password", "dbname", "persist", "dump", "load", "copy_from", "log_path", "ttl", "tcp")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteOptions(ServerOptions):
    """What a suite of tests is run with."""

    template: Sequence[str] = option(
        (),
        "what databases start with: SQL, a directory of SQL files, a dump, or cmd:COMMAND, which "
        "gets DATABASE_URL; several are applied in turn",
    )
    watch: Sequence[str] = option(
        (), "files, as a glob, that decide how a command or a function of the template comes out"
    )
    isolation: str = option(
        "database",
        "what each test gets of its own: a database, or a cluster (a whole server)",
        choices=ISOLATIONS,
    )
    keep: str = option(
        "failed",
        "whose databases are kept, for `pgtemp open`, when pytest has ended",
        choices=("failed", "all", "none"),
    )
    keep_most: int = option(10, "databases kept at most by each process")
    log: str = option(
        "server",
        "what a failing test's report has of the server's log: its lines of it (server), also all "
        "statements with their times (statements), or nothing (none)",
        choices=("server", "statements", "none"),
    )


def suite_fields() -> Iterator[tuple[str, Field[Any]]]:
    """The options of a suite by the names that pytest's options and ini file have, in order.

    A name is that of the environment variable where there is one, as in PGTEMP_BIN.
    """
    for spec in fields(SuiteOptions):
        if spec.name not in _NOT_FOR_SUITES:
            variable = spec.metadata["env"]
            yield (variable.lower() if variable else f"pgtemp_{spec.name}"), spec
