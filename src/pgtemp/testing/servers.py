"""Servers for tests that need a server of their own, each with one database."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pgtemp.cluster import Cluster
from pgtemp.database import Database
from pgtemp.errors import PgTempError
from pgtemp.template import Template


@dataclass(eq=False, slots=True)
class Server:
    """A cluster with a template and a database, for one test."""

    cluster: Cluster
    template: Template
    database: Database


@dataclass(frozen=True, slots=True)
class Servers:
    """Creates and stops servers for a pool.

    Attributes:
        cluster: a function that creates a cluster, without starting it.
        template: a function that returns the template in a cluster.
    """

    recycles = False

    cluster: Callable[[], Cluster]
    template: Callable[[Cluster], Template]

    def provision(self) -> Server:
        cluster = self.cluster().start()
        try:
            template = self.template(cluster)
            return Server(cluster, template, template.database())
        except BaseException:
            cluster.stop()
            raise

    def dispose(self, server: Server) -> None:
        server.cluster.stop()

    def usable(self, server: Server) -> bool:
        try:
            server.database.shared.postmaster.check()
        except PgTempError:
            return False
        return True
