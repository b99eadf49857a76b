"""A server that many share."""

from __future__ import annotations

import pytest

from pgtemp.databases import provision, tenants, workshop
from pgtemp.databases.recipe import Recipe
from pgtemp.databases.tenants import TenantCluster
from pgtemp.options import ServerOptions
from pgtemp.server.cluster import Cluster


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
