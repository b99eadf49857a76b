"""A server that many share."""

from __future__ import annotations

import pytest

from pgtemp import PgTempDB
from pgtemp.databases import admin, connections, provision, tenants, workshop
from pgtemp.databases.recipe import Recipe
from pgtemp.databases.residue import Residue
from pgtemp.databases.tenants import TenantCluster
from pgtemp.options import ServerOptions
from pgtemp.server.cluster import Cluster
from pgtemp.uri import ConnectionInfo


def test_what_one_thread_has_found_no_other_takes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server is found to be stale while another thread looks whether it runs, which it does."""
    plan, _ = workshop.build(provision.plan(ServerOptions(), ()), "app", Recipe())
    made = TenantCluster(plan, keep=False)
    try:
        runs = tenants.alive

        def alive_but_stale(cluster: Cluster) -> bool:
            made.spoil()
            return runs(cluster)

        assert not made.stale
        monkeypatch.setattr(tenants, "alive", alive_but_stale)
        made.check()
        assert made.stale
    finally:
        made.stop()


def test_a_database_that_goes_while_it_is_looked_for_was_not_left() -> None:
    """It is listed, and by the time that somebody asks whose it is, it was dropped."""
    with PgTempDB() as db:
        to = ConnectionInfo(
            host=str(db.socket_dir), port=db.port, user=db.user, dbname=admin.MAINTENANCE
        )
        with connections.connected(to) as connection, connections.connected(to) as other:

            def ours(name: str) -> bool:
                if name == "goes":
                    admin.drop(other, name, to)
                return False

            residue = Residue(db.data_dir, ours)
            residue.accept(connection)
            admin.ensure_database(connection, "goes", db.user)
            assert residue.found(connection) == []
            admin.ensure_database(connection, "stays", db.user)
            assert residue.found(connection) == [("database", "stays")]
