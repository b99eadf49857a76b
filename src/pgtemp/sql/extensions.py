"""Create extensions by name; if one is not installed, the error names the package to install."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import sql

from pgtemp.errors import OptionError

ALL = "all"
_NOT_INSTALLED = r'extension "([^"]+)" (?:is not available|has no installation script)'
_log = logging.getLogger("pgtemp")
# The NAME in the package of an extension. Packages of Debian and Ubuntu are called
# postgresql-MAJOR-NAME; the extensions of PostgreSQL itself are in postgresql-contrib on other
# systems. An extension that is not listed here has its own name, with - for _.
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
    """Create extensions and the extensions that they require.

    Args:
        connection: an autocommit connection to the database, as a superuser.
        names: the names of extensions; "all" is every available extension that can be created.
        major: the major version of PostgreSQL, for the name of a package.

    Raises:
        OptionError: an extension is not installed; the error names the installed extensions and
            the package.
        psycopg.Error: an extension is installed but PostgreSQL could not create it.
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
        except psycopg.Error as error:  # it needs a setting, or a program that is not installed
            _log.info("extension %s cannot be created: %s", name, str(error).strip())


def missing_in(message: str, major: int) -> str | None:
    """Return the remedy if a message of PostgreSQL reports an extension that is not installed."""
    found = re.search(_NOT_INSTALLED, message)
    return _install(found[1], major) if found else None


def _install(name: str, major: int) -> str:
    package = f"postgresql-{major}-{_PACKAGES.get(name, name.replace('_', '-'))}"
    return f"install the extension {name} (on Debian and Ubuntu: apt-get install {package})"


def _missing(name: str, available: Sequence[str], major: int) -> OptionError:
    close = difflib.get_close_matches(name, available, n=1)
    remedy = f"did you mean {close[0]}? otherwise " if close else ""
    return OptionError(
        f"the extension {name!r} is not installed for this PostgreSQL {major}",
        remedy=f"{remedy}{_install(name, major)}",
        details=["available: " + (", ".join(available) or "none")],
    )
