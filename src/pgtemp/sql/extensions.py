"""Extensions by name: created where they are installed, and a helpful word where they are not."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import sql

from pgtemp.errors import OptionError

ALL = "all"
_log = logging.getLogger("pgtemp")
# The package of an extension, where it is not the extension's own name. Debian's and Ubuntu's are
# postgresql-MAJOR-NAME; what comes with PostgreSQL itself is in postgresql-contrib elsewhere.
_PACKAGES = {
    "vector": "pgvector",
    "postgis": "postgis-3",
    "postgis_topology": "postgis-3",
    "postgis_raster": "postgis-3",
    "timescaledb": "timescaledb",
    "pg_cron": "cron",
    "pg_partman": "partman",
    "pg_repack": "repack",
    "pg_hint_plan": "pg-hint-plan",
    "plpython3u": "plpython3",
    "pltcl": "pltcl",
    "hll": "hll",
    "orafce": "orafce",
    "pgtap": "pgtap",
    "pgrouting": "pgrouting",
    "rum": "rum",
    "h3": "h3",
}


def create(connection: psycopg.Connection[Any], names: Sequence[str], major: int) -> None:
    """Create extensions, with those they need.

    Args:
        connection: an autocommit one to the database, as a superuser.
        names: of extensions; "all" is every one that there is and that can be created.
        major: the version of PostgreSQL, for the name of a package.

    Raises:
        OptionError: one is not installed; names those that are, and the package.
        psycopg.Error: PostgreSQL's, where it is installed and cannot be created.
    """
    rows = connection.execute("SELECT name FROM pg_available_extensions ORDER BY name").fetchall()
    available = [str(name) for (name,) in rows]
    for name in names:
        if name == ALL:
            _create_all(connection, available)
        elif name in available:
            _create(connection, name)
        else:
            raise _missing(name, available, major)


def _create(connection: psycopg.Connection[Any], name: str) -> None:
    connection.execute(
        sql.SQL("CREATE EXTENSION IF NOT EXISTS {} CASCADE").format(sql.Identifier(name))
    )


def _create_all(connection: psycopg.Connection[Any], available: Sequence[str]) -> None:
    for name in available:
        try:
            _create(connection, name)
        except psycopg.Error as error:  # it needs a setting, or a program that is not there
            _log.info("extension %s cannot be created: %s", name, str(error).strip())


def _missing(name: str, available: Sequence[str], major: int) -> OptionError:
    package = f"postgresql-{major}-{_PACKAGES.get(name, name.replace('_', '-'))}"
    close = difflib.get_close_matches(name, available, n=1)
    remedy = f"did you mean {close[0]}? else " if close else ""
    return OptionError(
        f"the extension {name!r} is not installed for this PostgreSQL {major}",
        remedy=f"{remedy}install it (on Debian and Ubuntu: apt-get install {package})",
        details=["available: " + (", ".join(available) or "none")],
    )
