"""pgtemp's own connections."""

from __future__ import annotations

from pgtemp import PgTempDB
from pgtemp.databases import admin, connections
from pgtemp.uri import ConnectionInfo


def test_what_is_asked_again_is_planned_once() -> None:
    """Also where databases are renamed and dropped between; whatever they are called."""
    names = ["plain", "it's", 'a "b"', "back\\slash", "$1; %s"]
    with PgTempDB() as db:
        to = ConnectionInfo(host=str(db.socket_dir), port=db.port, user=db.user, dbname=db.dbname)
        with connections.connected(to) as connection:
            for name in names:
                assert not admin.exists(connection, name)
                admin.ensure_database(connection, name, db.user)
                assert admin.exists(connection, name)
                admin.rename(connection, name, "renamed")
                admin.drop(connection, "renamed", to)
                assert not admin.exists(connection, name)
            plans = connection.execute(
                "SELECT generic_plans, custom_plans FROM pg_prepared_statements"
                " WHERE statement LIKE %s", ["%pg_database WHERE datname%"],
            ).fetchall()  # fmt: skip
        assert plans == [(4 * len(names), 0)]
