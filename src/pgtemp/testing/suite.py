"""The servers and templates of one run of tests, in one process.

Each template is built once, when a test first needs it; if the build fails, it is not repeated for
other tests. Templates that can be cached on disk are cached. If several processes share a run
(pytest-xdist), the other templates are cached for the duration of the run, so that each is built by
one process for all.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pgtemp.allocation.pool import Pool
from pgtemp.cluster import Cluster
from pgtemp.database import Database
from pgtemp.images import cache
from pgtemp.options.pytest import SuiteOptions
from pgtemp.template import Template
from pgtemp.templates.recipe import Build, Recipe
from pgtemp.testing import persisted, serverlog
from pgtemp.testing.requirements import Needs, Usual, recipe_of
from pgtemp.testing.rollback import RolledBack
from pgtemp.testing.run import Run
from pgtemp.testing.servers import Server, Servers

_NAME = "test"  # the prefix of the names of templates, and thus of databases


class Suite:
    """The servers and templates that the tests of one process share."""

    def __init__(self, options: SuiteOptions, root: Path, run: Run) -> None:
        """Create a suite; no server is started yet.

        Args:
            root: the directory that relative paths refer to.
        """
        self.options = options
        self._root = root
        self._run = run
        self._clusters: dict[Hashable, Cluster] = {}
        self._templates: dict[Hashable, Template | Exception] = {}
        self._recipes: dict[Recipe, Recipe] = {}
        self._servers: dict[Hashable, Pool[Server]] = {}
        self._held: dict[Database, tuple[Pool[Server], Server]] = {}
        self._bases: dict[Template, list[Database]] = {}  # for RolledBack; no test uses them
        self._origins: dict[Database, Template] = {}
        self._persisted: dict[Database, Path] = {}  # to persist, and in which directories
        self._caches_for_run = False

    @property
    def cluster(self) -> Cluster:
        """The cluster for tests that need no settings of their own. Raises PgTempError."""
        return self._cluster({})

    def claim(self, needs: Needs, cluster: Cluster, usual: Build | Recipe | None) -> Database:
        """Return a database for a test.

        Args:
            cluster: the cluster for it, unless the test needs settings of its own.
            usual: its template, unless the test needs another one.

        Raises:
            PgTempError: no database is available. An exception of a build is raised unchanged.
        """
        recipe = self._recipe(usual if isinstance(needs.template, Usual) else needs.template)
        if (needs.isolation or self.options.isolation) == "cluster" and not needs.rollback:
            return self._database_in_own_server(needs, recipe)
        chosen = self._cluster(needs.settings) if needs.settings else cluster
        template = self._template(chosen, recipe, needs)
        if not needs.rollback:
            return self._claimed(template, template.database())
        bases = self._bases.setdefault(template, [])
        return RolledBack(bases.pop() if bases else template.database(), bases)

    def release(self, database: Database, *, keep: bool) -> None:
        """Release a database, and its server if the test had a server of its own.

        Args:
            keep: do not drop the database, because `keep` has scheduled it to be persisted.
        """
        if keep:
            database.leave()
        else:
            database.close()
        self._origins.pop(database, None)
        if database in self._held:
            pool, server = self._held.pop(database)
            pool.retire(server)

    def keep(self, database: Database, of: str) -> str | None:
        """Persist a database when the suite ends.

        Args:
            of: the name of the test, which is stored with the database.

        Returns:
            The command that opens the database; None if `keep_most` databases are already
            persisted.

        Raises:
            PgTempError: no directory for it could be created.
        """
        template = self._origins[database]
        if database not in self._persisted:
            number = len(self._persisted)
            if number >= self.options.keep_most:
                return None
            if template._directory is None:
                folder = persisted.directory_for(self.options, self._run.name)
                template._directory = folder / f"{self._run.worker or 'server'}-{number}"
            template._persisted[database.dbname] = of
            self._persisted[database] = template._directory
        return f"pgtemp open {self._persisted[database]} --dbname {database.dbname}"

    def close(self) -> None:
        """Stop all servers; the databases selected by `keep` are persisted."""
        with ExitStack() as cleanup:
            if self._run.worker is None and self._caches_for_run:
                cleanup.callback(cache.forget, self._run.name)
            for cluster in self._clusters.values():
                cleanup.callback(cluster.stop)
            for pool in self._servers.values():
                cleanup.callback(pool.close)
            for _, server in self._held.values():
                cleanup.callback(server.cluster.stop)

    def _claimed(self, template: Template, database: Database) -> Database:
        self._origins[database] = template
        return database

    def _database_in_own_server(self, needs: Needs, recipe: Recipe) -> Database:
        recipe = self._cached_for_run(recipe)
        key = recipe, tuple(needs.extensions), frozenset(needs.settings.items())
        if key not in self._servers:
            self._servers[key] = Pool(
                Servers(
                    lambda: self._new(needs.settings),
                    lambda cluster: self._with_extensions(cluster, recipe, needs),
                ),
                ready=1,
            )
        pool = self._servers[key]
        server = pool.take()
        self._held[server.database] = pool, server
        return self._claimed(server.template, server.database)

    def _cluster(self, settings: dict[str, str]) -> Cluster:
        key = frozenset(settings.items())
        if key not in self._clusters:
            self._clusters[key] = self._new(settings).start()
        return self._clusters[key]

    def _new(self, settings: dict[str, str]) -> Cluster:
        logging = serverlog.STATEMENTS if self.options.log == "statements" else {}
        return Cluster.with_options(self.options, {**logging, **settings})

    def _recipe(self, build: Build | Recipe | None) -> Recipe:
        recipe = recipe_of(build, self._root, self.options.watch)
        return self._cached_for_run(recipe) if self._run.worker is not None else recipe

    def _cached_for_run(self, recipe: Recipe) -> Recipe:
        """Return a recipe whose template is cached, if only for the duration of the run."""
        if recipe not in self._recipes:
            cacheable = recipe.fingerprint() is not None
            self._caches_for_run = self._caches_for_run or not cacheable
            self._recipes[recipe] = recipe if cacheable else replace(recipe, run=self._run.name)
        return self._recipes[recipe]

    def _template(self, cluster: Cluster, recipe: Recipe, needs: Needs) -> Template:
        key = id(cluster), recipe, tuple(needs.extensions)
        if key not in self._templates:
            try:
                self._templates[key] = self._with_extensions(cluster, recipe, needs)
            except Exception as error:
                self._templates[key] = error
                raise
        template = self._templates[key]
        if isinstance(template, Exception):
            raise template.with_traceback(None)
        return template

    def _with_extensions(self, cluster: Cluster, recipe: Recipe, needs: Needs) -> Template:
        # An image is cached under this name, so it must be the same in all processes, regardless of
        # the order in which they need the templates.
        fingerprint = recipe.fingerprint()
        name = f"{_NAME}_{fingerprint[:8] if fingerprint else len(self._templates)}"
        template = cluster.template(name, recipe)
        if not needs.extensions:
            return template
        return template.template(f"{name}+", Recipe(extensions=needs.extensions))
