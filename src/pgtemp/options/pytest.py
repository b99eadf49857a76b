"""The options of the pytest plugin, in addition to those of its servers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any

from pgtemp.options.server import ServerOptions, option

ISOLATIONS = ("database", "cluster")
# Options that the plugin itself determines, or that concurrent pytest-xdist workers cannot share.
_NOT_FOR_SUITES = frozenset(
    ("port", "password", "dbname", "persist", "dump", "load", "copy_from", "log_path", "ttl", "tcp")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteOptions(ServerOptions):
    """The options of a test suite.

    Raises:
        OptionError: a value is invalid; the error names the option and the reason.
    """

    template: Sequence[str] = option(
        (),
        "initial content of databases: SQL, a directory of SQL files, a dump, or cmd:COMMAND, "
        "which gets DATABASE_URL; several are applied in turn",
    )
    watch: Sequence[str] = option(
        (),
        "files, as a glob, that determine the result of a command or a function of the template",
    )
    isolation: str = option(
        "database",
        "each test gets its own database, or its own cluster (a whole server)",
        choices=ISOLATIONS,
    )
    keep: str = option(
        "failed",
        "the tests whose databases are persisted at the end of the run, for `pgtemp open`: "
        "failed, all or none",
        choices=("failed", "all", "none"),
    )
    keep_most: int = option(10, "maximum number of databases that each process persists")
    log: str = option(
        "server",
        "the part of the server log in a failing test's report: the lines of the test (server), "
        "also all statements with their times (statements), or nothing (none)",
        choices=("server", "statements", "none"),
    )


def suite_fields() -> Iterator[tuple[str, Field[Any]]]:
    """Yield each option of a suite with its name in pytest's command line and ini file, in order.

    If the option has an environment variable, such as PGTEMP_BIN, the name is the variable's name
    in lower case.
    """
    for spec in fields(SuiteOptions):
        if spec.name not in _NOT_FOR_SUITES:
            variable = spec.metadata["env"]
            yield (variable.lower() if variable else f"pgtemp_{spec.name}"), spec
