"""pgtemp's own connections to its servers."""

from __future__ import annotations

from pgtemp import PgTempDB
from pgtemp.sql import admin_sql
from pgtemp.sql.connection import connected
from pgtemp.uri import ConnectionInfo


def test_repeated_statements_are_planned_once() -> None:
    """Databases with any name may be renamed and dropped in between."""
    names = ["plain", "it's", 'a "b"', "back\\slash", "$1; %s"]
    with PgTempDB() as db:
        to = ConnectionInfo(host=str(db.socket_dir), port=db.port, user=db.user, dbname=db.dbname)
        with connected(to) as connection:
            for name in names:
                assert not admin_sql.exists(connection, name)
                admin_sql.ensure_database(connection, name, db.user)
                assert admin_sql.exists(connection, name)
                admin_sql.rename(connection, name, "renamed")
                admin_sql.drop(connection, "renamed", to)
                assert not admin_sql.exists(connection, name)
            plans = connection.execute(
                "SELECT generic_plans, custom_plans FROM pg_prepared_statements"
                " WHERE statement LIKE %s", ["%pg_database WHERE datname%"],
            ).fetchall()  # fmt: skip
        assert plans == [(4 * len(names), 0)]
