"""Create extensions by name; if one is not installed, the error states the package to install."""

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
# PostgreSQL's own extensions (contrib, in PostgreSQL 15 to 18). On Debian and Ubuntu, the package
# of the server contains them; on other systems, postgresql-contrib does.
_CONTRIB = {
    "adminpack", "amcheck", "autoinc", "bloom", "btree_gin", "btree_gist", "citext", "cube",
    "dblink", "dict_int", "dict_xsyn", "earthdistance", "file_fdw", "fuzzystrmatch", "hstore",
    "insert_username", "intagg", "intarray", "isn", "lo", "ltree", "moddatetime", "old_snapshot",
    "pageinspect", "pg_buffercache", "pg_freespacemap", "pg_logicalinspect", "pg_prewarm",
    "pg_stat_statements", "pg_surgery", "pg_trgm", "pg_visibility", "pg_walinspect", "pgcrypto",
    "pgrowlocks", "pgstattuple", "postgres_fdw", "refint", "seg", "sslinfo", "tablefunc", "tcn",
    "tsm_system_rows", "tsm_system_time", "unaccent", "uuid-ossp", "xml2",
}  # fmt: skip
# PostgreSQL's procedural languages, and extensions for them, are in packages of Debian and Ubuntu
# called postgresql-LANGUAGE-MAJOR.
_LANGUAGES = {"plperl": "plperl", "plpython3u": "plpython3", "pltcl": "pltcl"}
# Packages of other extensions are called postgresql-MAJOR-NAME. For an extension that is not listed
# here, NAME is the extension's own name with "-" in place of "_".
_PACKAGES = {
    "vector": "pgvector",
    "postgis": "postgis-3",
    "postgis_topology": "postgis-3",
    "postgis_raster": "postgis-3",
    "pg_cron": "cron",
    "pg_partman": "partman",
    "pg_repack": "repack",
}


def create(connection: psycopg.Connection[Any], names: Sequence[str], major: int) -> None:
    """Create extensions and the extensions that they require.

    Args:
        connection: an autocommit connection to the database, as a superuser.
        names: the names of extensions; "all" means every available extension that can be created.
        major: the major version of PostgreSQL, which package names contain.

    Raises:
        OptionError: an extension is not installed; the error states the installed extensions and
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
    what = "postgresql-contrib" if name in _CONTRIB else f"the extension {name}"
    return (
        f"install {what} (on Debian and Ubuntu: apt-get install {_package(name, major)}), "
        "or use a PostgreSQL that contains it (bin_dir)"
    )


def _missing(name: str, available: Sequence[str], major: int) -> OptionError:
    close = difflib.get_close_matches(name, available, n=1)
    remedy = f"did you mean {close[0]}? otherwise " if close else ""
    return OptionError(
        f"the extension {name!r} is not installed for this PostgreSQL {major}",
        remedy=f"{remedy}{_install(name, major)}",
        details=["available: " + (", ".join(available) or "none")],
    )


def _package(name: str, major: int) -> str:
    """Return the package of Debian and Ubuntu that contains an extension."""
    if name in _CONTRIB:
        return f"postgresql-{major}"
    for language, package in _LANGUAGES.items():
        if language in name:  # plperlu, jsonb_plperl
            return f"postgresql-{package}-{major}"
    return f"postgresql-{major}-{_PACKAGES.get(name, name.replace('_', '-'))}"
