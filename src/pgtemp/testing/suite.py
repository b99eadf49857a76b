"""The servers and templates of one run of tests, in one process.

Templates are built when a test first needs them, each once; one that cannot be built is not tried
again for every test. What can be kept on disk is, and where several processes share a run
(pytest-xdist), the rest is kept for the time of the run, so that one of them builds it for all.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pgtemp.allocation.pool import Pool
from pgtemp.cluster import Cluster, Template
from pgtemp.database import Database
from pgtemp.images import cache
from pgtemp.options.pytest import SuiteOptions
from pgtemp.templates.recipe import Build, Recipe
from pgtemp.testing import persisted, serverlog
from pgtemp.testing.requirements import Needs, Usual, recipe_of
from pgtemp.testing.rollback import RolledBack
from pgtemp.testing.run import Run
from pgtemp.testing.servers import Server, Servers
from pgtemp.works import Works

_NAME = "test"  # of templates, and so the beginning of databases' names


class Suite:
    """What the tests of one process share."""

    def __init__(self, options: SuiteOptions, root: Path, run: Run) -> None:
        """Nothing is started yet.

        Args:
            root: where relative paths start.
        """
        self.options = options
        self._root = root
        self._run = run
        self._clusters: dict[Hashable, Cluster] = {}
        self._templates: dict[Hashable, Template | Exception] = {}
        self._recipes: dict[Recipe, Recipe] = {}
        self._servers: dict[Hashable, Pool[Server]] = {}
        self._held: dict[Database, tuple[Pool[Server], Server]] = {}
        self._rolled: dict[Template, list[Database]] = {}  # bases that nobody has just now
        self._kept = 0
        self._for_run_alone = False

    @property
    def cluster(self) -> Cluster:
        """The cluster of tests that need no settings of their own. Raises PgTempError."""
        return self._cluster({})

    def claim(self, needs: Needs, cluster: Cluster, usual: Build | Recipe | None) -> Database:
        """A database for a test.

        Args:
            cluster: where it is, unless the test needs settings of its own.
            usual: what it starts with, unless the test needs something else.

        Raises:
            PgTempError: it cannot be had. What a build raises comes as it is.
        """
        recipe = self._recipe(usual if isinstance(needs.template, Usual) else needs.template)
        if (needs.isolation or self.options.isolation) == "cluster" and not needs.rollback:
            return self._own(needs, recipe)
        place = self._cluster(needs.settings) if needs.settings else cluster
        template = self._template(place, recipe, needs)
        if not needs.rollback:
            return template.database()
        bases = self._rolled.setdefault(template, [])
        return RolledBack(bases.pop() if bases else template.database(), bases)

    def release(self, database: Database, *, keep: bool) -> None:
        """Take a database back; with its server, where it has one for itself."""
        if keep:
            database.leave()
        else:
            database.close()
        if database in self._held:
            pool, server = self._held.pop(database)
            pool.retire(server)

    def keep(self, database: Database, of: str) -> str | None:
        """Have a database outlive the suite; the command that opens it, or None: there are enough.

        Args:
            of: the test, for whoever looks at what was kept.

        Raises:
            PgTempError: there is no place for it.
        """
        works = database.works
        if database.dbname not in works.kept and self._kept >= self.options.keep_most:
            return None
        place = self._place_of(works)
        if database.dbname not in works.kept:
            self._kept += 1
            works.kept[database.dbname] = of
        return f"pgtemp open {place} --dbname {database.dbname}"

    def close(self) -> None:
        """End all servers; what is to be kept is."""
        with ExitStack() as all_of_them:
            if self._run.worker is None and self._for_run_alone:
                all_of_them.callback(cache.forget, self._run.name)
            for cluster in self._clusters.values():
                all_of_them.callback(cluster.stop)
            for pool in self._servers.values():
                all_of_them.callback(pool.close)
            for _, server in self._held.values():
                all_of_them.callback(server.cluster.stop)

    def _place_of(self, works: Works) -> Path:
        if works.keep_in is None:
            folder = persisted.directory_for(self.options, self._run.name)
            works.keep_in = folder / f"{self._run.worker or 'server'}-{self._kept}"
        return works.keep_in

    def _own(self, needs: Needs, recipe: Recipe) -> Database:
        recipe = self._for_the_run(recipe)
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
        return server.database

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
        return self._for_the_run(recipe) if self._run.worker is not None else recipe

    def _for_the_run(self, recipe: Recipe) -> Recipe:
        """A recipe that is kept for the run at least, where that can be."""
        if recipe not in self._recipes:
            kept = recipe.fingerprint() is not None
            self._for_run_alone = self._for_run_alone or not kept
            self._recipes[recipe] = recipe if kept else replace(recipe, run=self._run.name)
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
        # The same name in all processes, whatever they need first: an image is kept under it.
        fingerprint = recipe.fingerprint()
        name = f"{_NAME}_{fingerprint[:8] if fingerprint else len(self._templates)}"
        template = cluster.template(name, recipe)
        if not needs.extensions:
            return template
        return template.template(f"{name}+", Recipe(extensions=needs.extensions))
