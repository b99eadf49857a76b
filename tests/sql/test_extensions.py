"""The remedy for an extension that is not installed: the package that contains it."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from pgtemp import OptionError, PgTempDB
from pgtemp.sql import extensions


@pytest.fixture(scope="module")
def connection() -> Iterator[psycopg.Connection]:
    with PgTempDB() as db, db.connect(autocommit=True) as connection:
        yield connection


@pytest.fixture
def without(connection: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """A session in which no extension is available, as on a server without contrib."""
    connection.execute("CREATE TEMP TABLE pg_available_extensions (name text)")
    connection.execute("SET search_path = pg_temp, pg_catalog")
    yield connection
    connection.execute("RESET search_path")
    connection.execute("DROP TABLE pg_temp.pg_available_extensions")


@pytest.mark.parametrize(
    ("name", "what", "package"),
    [
        ("pg_trgm", "postgresql-contrib", "postgresql-18"),
        ("uuid-ossp", "postgresql-contrib", "postgresql-18"),
        ("vector", "the extension vector", "postgresql-18-pgvector"),
        ("postgis", "the extension postgis", "postgresql-18-postgis-3"),
        ("pg_hint_plan", "the extension pg_hint_plan", "postgresql-18-pg-hint-plan"),
        ("jsonb_plperl", "the extension jsonb_plperl", "postgresql-plperl-18"),
        ("plpython3u", "the extension plpython3u", "postgresql-plpython3-18"),
    ],
)
def test_the_remedy_names_the_package(
    without: psycopg.Connection, name: str, what: str, package: str
) -> None:
    with pytest.raises(OptionError) as missing:
        extensions.create(without, [name], 18)
    assert missing.value.remedy == (
        f"install {what} (on Debian and Ubuntu: apt-get install {package}), "
        "or use a PostgreSQL that contains it (bin_dir)"
    )
    assert missing.value.details == ("available: none",)


def test_every_extension_of_contrib_is_known(connection: psycopg.Connection) -> None:
    """All extensions of a server are in the list, except languages, and pgvector of some wheels."""
    rows = connection.execute("SELECT name FROM pg_available_extensions").fetchall()
    available = {str(name) for (name,) in rows}
    assert "pg_trgm" in available
    others = {name for name in available if "pl" in name or name == "vector"}
    assert available - others <= extensions._CONTRIB
