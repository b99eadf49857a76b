"""A cluster provides many databases, each a clone of a template from a pool of ready clones.

    with Cluster() as cluster:
        app = cluster.template("app", build=migrate)
        with app.database() as db:
            psycopg.connect(db.uri)

Starting a server takes thirty milliseconds, making a clone ten; a clone that is ready takes none.

If the result of a template follows from its inputs, the template is cached on disk as an image of a
whole server. Such a template has its own server, which becomes the cluster's main server if the
cluster has none yet. All other templates are built in the main server.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from types import MappingProxyType, TracebackType
from typing import Self

from pgtemp.database import Database
from pgtemp.errors import ClusterError, OptionError
from pgtemp.options.server import ServerOptions, StrPath, takes_options
from pgtemp.pgtempdb import PgTempDB
from pgtemp.sql import server_setup
from pgtemp.sql.admin_sql import BASE
from pgtemp.sql.server_setup import Plan
from pgtemp.templates import builder, clones
from pgtemp.templates.clones import Clones
from pgtemp.templates.recipe import Build, Recipe
from pgtemp.uri import ConnectionInfo
from pgtemp.works import Works

READY = 2  # the number of ready clones of each template that is in use
_NOT_FOR_MANY = ("dump", "load")
_RESTARTED = "the cluster was stopped and started again while the template was built"


class Cluster:
    """A PostgreSQL server for many databases. Keyword arguments are `pgtemp.ServerOptions`.

    The server starts when it is first needed. `dbname` is not used: databases are made by
    `database()` and by templates. `dump` and `load` are not allowed: use `Database.dump()`, and a
    template with `build=`.

    Raises:
        PgTempError: see `PgTempDB`.
    """

    @takes_options(ServerOptions)
    def __init__(self, options: ServerOptions) -> None:
        self._set_up(options)

    @classmethod
    def with_options(
        cls, options: ServerOptions, settings: Mapping[str, str] = MappingProxyType({})
    ) -> Self:
        """Return a cluster for an options object.

        Args:
            settings: settings of the cluster's servers. Templates are built without them, so that
                cached templates can be used with any settings.
        """
        self = cls.__new__(cls)
        self._set_up(options, settings)
        return self

    def _set_up(
        self, options: ServerOptions, settings: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        for name in _NOT_FOR_MANY:
            if getattr(options, name) is not None:
                raise OptionError(
                    f"{name}= cannot be used with a cluster",
                    remedy="use template(build=…) to load, and Database.dump() to dump",
                )
        # Extensions are created in a template from which all others start.
        self._extensions = Recipe(extensions=tuple(options.extensions))
        self._options = replace(options, extensions=())
        self._serving = replace(self._options, config={**options.config, **settings})
        self._owner = os.getpid()
        self._plan: Plan | None = None
        self._main: Works | None = None
        self._others: list[Works] = []
        self._made: dict[str, tuple[object, Future[Template]]] = {}
        self._empty: Template | None = None
        self._changing = threading.RLock()

    def start(self) -> Self:
        """Find the programs and directories; does nothing if the cluster is already started.

        Raises:
            PgTempError: see `PgTempDB`.
        """
        with self._changing:
            if self._plan is None:
                plan = server_setup.plan(self._options, ())
                if self._extensions != Recipe():
                    plan = builder.lasting(plan, "extensions", self._extensions) or plan
                self._plan, self._owner = plan, os.getpid()
                _running.add(self)
        return self

    def stop(self) -> None:
        """Stop all servers of the cluster, with their databases; in a forked child, do nothing."""
        if self._owner != os.getpid():
            return
        with self._changing:
            works = [*self._others, *([self._main] if self._main is not None else [])]
            self._plan, self._main, self._others, self._made = None, None, [], {}
            self._empty = None
            _running.discard(self)
        with ExitStack() as all_of_them:
            for one in works:
                all_of_them.callback(one.stop)

    def template(
        self,
        name: str,
        build: Build | Recipe,
        *,
        key: str | None = None,
        watch: Sequence[StrPath] = (),
    ) -> Template:
        """Return a template; it is built when its name is first used.

        A template from SQL files or dumps is cached on disk until the files change. A callable or a
        command is run each time, unless `key` or `watch` declares when its result changes.

        Args:
            name: any name; the same name must always have the same build.
            build: see `pgtemp.Recipe`; or a `Recipe`, which also contains `key` and `watch`.
            key: part of the cached template's hash; change it when the build changes.
            watch: glob patterns of files; the template is rebuilt when their contents change.

        Raises:
            PgTempError: the build failed; nothing is left behind. An error of a callable is raised
                unchanged.
        """
        return self._template(name, _recipe(build, key, watch), None)

    def database(self) -> Database:
        """Claim an empty database from the pool."""
        return self._default().database()

    @property
    def info(self) -> ConnectionInfo:
        """Host, port, user and password of the main server."""
        return self._main_works().server.info

    @property
    def server(self) -> PgTempDB:
        """The main server, with its directory, log and pid."""
        return self._main_works().server

    def _default(self) -> Template:
        self._check_owner()
        with self._changing:
            if self._empty is None:
                source = self._running().template or BASE
                self._empty = Template(self, self._main_works(), "empty", source, None)
            return self._empty

    def _template(self, name: str, recipe: Recipe, parent: Template | None) -> Template:
        """Build each name once; concurrent callers wait for the build and get its error."""
        self._check_owner()
        clones.check_name(name)
        if parent is not None and recipe.data_dir is not None:
            raise OptionError(
                f"{recipe.data_dir} is a data directory, and cannot start from {parent.name!r}",
                remedy="make it a template of the cluster",
            )
        with self._changing:
            plan = self._running()
            made = self._made
            mine = name not in made
            known, future = made.setdefault(name, ((recipe, parent), Future()))
        if not mine:
            if known != (recipe, parent):
                raise OptionError(
                    f"the template {name!r} was already built with another recipe or parent",
                    remedy="give each template a name of its own",
                )
            return future.result()
        try:
            future.set_result(self._build(plan, name, recipe, parent))
        except BaseException as error:
            with self._changing:
                del made[name]  # the next call tries again
            future.set_exception(error)
            raise
        return future.result()

    def _build(self, plan: Plan, name: str, recipe: Recipe, parent: Template | None) -> Template:
        start = plan if parent is None else parent._plan
        cached = builder.lasting(start, name, recipe) if start is not None else None
        if cached is not None:
            works, dbname = self._works_on(plan, cached), builder.TEMPLATE
        else:
            works = parent._works if parent is not None else self._main_works()
            dbname = clones.build(
                works.admins,
                works.server.installation,
                recipe,
                name=name,
                source=parent.dbname if parent is not None else plan.template or BASE,
                info=works.server.info,
            )
        with self._changing:
            if self._plan is not plan:
                self._running()
                raise ClusterError(_RESTARTED, remedy="call template() again")
            return Template(self, works, name, dbname, cached)

    def _main_works(self) -> Works:
        self._check_owner()
        with self._changing:
            plan = self._running()
            if self._main is None:
                self._main = self._start(plan, first=True)
            return self._main

    def _works_on(self, plan: Plan, cached: Plan) -> Works:
        """Start a server on the image of a cached template."""
        cached.spec.source.resolve()  # builds the image; outside the lock, because it takes long
        with self._changing:
            if self._running() is not plan:
                raise ClusterError(_RESTARTED, remedy="call template() again")
            if self._main is None and plan.template is None:
                self._main = self._start(cached, first=True)
                return self._main
            self._others.append(self._start(cached, first=False))
            return self._others[-1]

    def _start(self, plan: Plan, *, first: bool) -> Works:
        # The options `port` and `log_path` apply to the first server only.
        options = self._serving if first else replace(self._serving, port=None, log_path=None)
        return Works(PgTempDB.with_options(options, plan.spec.source).start())

    def _check_owner(self) -> None:
        # Check before taking a lock: another thread may have held it at the time of the fork.
        if self._owner != os.getpid():
            raise ClusterError(
                "the cluster belongs to the process that this one was forked from",
                remedy="make one in this process",
            )

    def _running(self) -> Plan:
        if self._plan is None:
            raise ClusterError("the cluster is not running", remedy="call start(), or use `with`")
        return self._plan

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Cluster {self._main.server!r}>" if self._main else "<Cluster, no server yet>"


class Template:
    """A sealed database that others are cloned from; made by `Cluster.template`."""

    def __init__(
        self, cluster: Cluster, works: Works, name: str, dbname: str, plan: Plan | None
    ) -> None:
        self.name = name
        self.dbname = dbname
        self._cluster = cluster
        self._works = works
        self._plan = plan  # the plan of servers with this template; None if it is not cached
        self._clones = Clones(works.admins, dbname, works.server.user, name)
        self._pool = works.pool_of(self._clones, READY)

    def database(self) -> Database:
        """Claim a clone from the pool.

        Raises:
            PgTempError: the clone could not be made.
        """
        return Database(self._works, self._pool.take(), self._pool, self._clones)

    def template(
        self,
        name: str,
        build: Build | Recipe,
        *,
        key: str | None = None,
        watch: Sequence[StrPath] = (),
    ) -> Template:
        """Return a template that starts from this one; see `Cluster.template`."""
        return self._cluster._template(name, _recipe(build, key, watch), self)

    def __repr__(self) -> str:
        return f"<Template {self.name!r}>"


def _recipe(build: Build | Recipe, key: str | None, watch: Sequence[StrPath]) -> Recipe:
    return build if isinstance(build, Recipe) else Recipe(build, key, watch)


_running: weakref.WeakSet[Cluster] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for cluster in list(_running):
        cluster.stop()
