"""A template of a cluster, and the server with its clones.

Each template has its own server, which is started on the template's image. Databases of other
templates therefore never share roles or settings with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pgtemp.allocation.pool import Pool
from pgtemp.allocation.shared_server import SharedServer
from pgtemp.database import Database
from pgtemp.options.server import ServerOptions, StrPath
from pgtemp.pgtempdb import PgTempDB
from pgtemp.sql import admin_sql
from pgtemp.sql.server_setup import Plan
from pgtemp.templates.builder import TemplateBuilder
from pgtemp.templates.recipe import Build, Recipe

READY = 2  # the number of ready clones of each template that is in use
# A test connects to its database within this time; the pool creates the next one afterwards.
_PAUSE_SECONDS = 0.004


class Template:
    """A sealed database that others are cloned from; created by `Cluster.template`."""

    def __init__(
        self,
        name: str,
        plan: Plan,
        builder: TemplateBuilder | None,
        options: ServerOptions,
        derive: Callable[[str, Recipe, Template], Template],
    ) -> None:
        """Start the server. Raises PgTempError.

        Args:
            plan: the plan of servers with the template.
            builder: the builder that owns its image, if the image is not cached.
            options: the options of the server.
            derive: a function that returns a template with a name and a recipe, based on this one.
        """
        self.name = name
        self.dbname = plan.template or admin_sql.BASE
        self._plan, self._builder, self._derive = plan, builder, derive
        # The databases to persist when the server stops, each with its origin, such as the name of
        # a test, and the directory for the server's data.
        self._persisted: dict[str, str] = {}
        self._directory: Path | None = None
        self._server = PgTempDB.with_options(options, plan.spec.source).start()
        self._shared = SharedServer(self._server._running_postmaster(), plan, name)
        self._pool = Pool(self._shared, ready=READY, pause=_PAUSE_SECONDS)

    def database(self) -> Database:
        """Claim a clone from the pool.

        Raises:
            PgTempError: the clone could not be created.
        """
        return Database(self._server, self._shared, self._pool, self._pool.take())

    def template(
        self,
        name: str,
        build: Build | Recipe,
        *,
        key: str | None = None,
        watch: Sequence[StrPath] = (),
    ) -> Template:
        """Return a template that starts from this template; see `Cluster.template`."""
        return self._derive(name, recipe_of(build, key, watch), self)

    def _stop(self) -> None:
        """Stop the server, and persist its data if that was requested.

        Raises:
            PgTempError: the data could not be persisted; the server is stopped anyway.
        """
        try:
            if self._directory is not None:
                self._pool.close()
                self._shared.settle()
                self._server.store(self._directory, self._persisted)
        finally:
            self._discard()

    def _discard(self) -> None:
        """Stop the server; threads that still create or drop databases in it fail immediately."""
        self._shared.interrupt()
        self._pool.refuse()
        try:
            self._server.stop()
        finally:
            self._pool.close(dispose=False)
            self._shared.close()
            if self._builder is not None:
                self._builder.close()

    def __repr__(self) -> str:
        return f"<Template {self.name!r}>"


def recipe_of(build: Build | Recipe, key: str | None, watch: Sequence[StrPath]) -> Recipe:
    """Return the recipe of the arguments of `template`."""
    return build if isinstance(build, Recipe) else Recipe(build, key, watch)
