"""Real, temporary PostgreSQL databases for tests."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pgtemp import aio as aio
    from pgtemp.cluster import Cluster
    from pgtemp.database import Database, Snapshot
    from pgtemp.errors import (
        ClusterError,
        InstallationError,
        OptionError,
        PgTempError,
        PgTempWarning,
        TransferError,
        WardenError,
    )
    from pgtemp.options.server import ServerOptions
    from pgtemp.pgtempdb import PgTempDB
    from pgtemp.template import Template
    from pgtemp.templates.recipe import Build, Recipe
    from pgtemp.uri import ConnectionInfo

__all__ = [
    "Build",
    "Cluster",
    "ClusterError",
    "ConnectionInfo",
    "Database",
    "InstallationError",
    "OptionError",
    "PgTempDB",
    "PgTempError",
    "PgTempWarning",
    "Recipe",
    "ServerOptions",
    "Snapshot",
    "Template",
    "TransferError",
    "WardenError",
]
_HOMES = {
    "Build": "pgtemp.templates.recipe",
    "Cluster": "pgtemp.cluster",
    "ConnectionInfo": "pgtemp.uri",
    "Database": "pgtemp.database",
    "PgTempDB": "pgtemp.pgtempdb",
    "Recipe": "pgtemp.templates.recipe",
    "ServerOptions": "pgtemp.options.server",
    "Snapshot": "pgtemp.database",
    "Template": "pgtemp.template",
}

if not TYPE_CHECKING:  # a type checker would otherwise accept any name

    def __getattr__(name: str) -> object:
        # Import on first use: the supervisor process also imports this package, and must not wait
        # until psycopg is imported.
        from importlib import import_module

        if name not in __all__ and name != "aio":
            raise AttributeError(f"module 'pgtemp' has no attribute {name!r}")
        if name == "aio":
            return import_module("pgtemp.aio")
        return getattr(import_module(_HOMES.get(name, "pgtemp.errors")), name)
