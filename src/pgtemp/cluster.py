"""Many databases: each a clone of a template, from a pool kept ready.

    with Cluster() as cluster:
        app = cluster.template("app", build=migrate)
        with app.database() as db:
            psycopg.connect(db.uri)

A server takes thirty milliseconds to start, a clone ten, and one that is ready already none.

A template whose outcome can be told from what it is made from is kept on disk, as an image of a
whole server; so it has a server of its own, which is the cluster's one server where nothing has
needed another yet. All other templates are built in the server that there is.
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

READY = 2  # clones kept ready of each template that is in use
_NOT_FOR_MANY = ("dump", "load")


class Cluster:
    """A PostgreSQL server for many databases. Keyword arguments are `pgtemp.ServerOptions`.

    The server starts when something first needs it. `dbname` is not used: databases come from
    `database()` and from templates. `dump` and `load` are those of a database or a template.

    Raises:
        PgTempError: as for `PgTempDB`.
    """

    @takes_options(ServerOptions)
    def __init__(self, options: ServerOptions) -> None:
        self._set_up(options)

    @classmethod
    def with_options(
        cls, options: ServerOptions, settings: Mapping[str, str] = MappingProxyType({})
    ) -> Self:
        """A cluster for options that are there as one value.

        Args:
            settings: of its servers alone; templates are built without them, so that those that
                are kept serve for any.
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
                    f"{name}= is not for a cluster",
                    remedy="use template(build=…) to load, and Database.dump() to dump",
                )
        # Extensions are in the template that all others begin with.
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
        """Find programs and places; what was started already stays.

        Raises:
            PgTempError: as for `PgTempDB`.
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
        """End the server with all its databases; nothing happens in a forked child."""
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
        """A template, built when its name is first used.

        One made from SQL files or dumps is kept on disk until they change. A callable or a
        command is run each time, unless `key` or `watch` tell when it would come out otherwise.

        Args:
            name: whatever the suite calls it.
            build: as of `pgtemp.Recipe`, or a whole one of these, which says the rest too.
            key: what the template is kept under; change it when the build changes.
            watch: glob patterns of files; it is built again when their contents change.

        Raises:
            PgTempError: the build failed; nothing of it is left. A callable's own error comes as
                it is.
        """
        return self._template(name, _recipe(build, key, watch), None)

    def database(self) -> Database:
        """An empty database of one's own, claimed from those kept ready."""
        return self._default().database()

    @property
    def info(self) -> ConnectionInfo:
        """Host, port, user and password of the server."""
        return self._main_works().server.info

    @property
    def server(self) -> PgTempDB:
        """The server itself, with its directory, log and pid."""
        return self._main_works().server

    def _default(self) -> Template:
        self._check_owner()
        with self._changing:
            if self._empty is None:
                source = self._running().template or BASE
                self._empty = Template(self, self._main_works(), "empty", source, None)
            return self._empty

    def _template(self, name: str, recipe: Recipe, parent: Template | None) -> Template:
        """Each name is built once, however many ask; everybody gets the error of one that fails."""
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
                    f"the template {name!r} was built from something else",
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
        begin = plan if parent is None else parent._plan
        kept = builder.lasting(begin, name, recipe) if begin is not None else None
        if kept is not None:
            works, dbname = self._works_on(plan, kept), builder.TEMPLATE
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
                raise ClusterError("the cluster was started anew meanwhile", remedy="ask again")
            return Template(self, works, name, dbname, kept)

    def _main_works(self) -> Works:
        self._check_owner()
        with self._changing:
            plan = self._running()
            if self._main is None:
                self._main = self._start(plan, first=True)
            return self._main

    def _works_on(self, plan: Plan, kept: Plan) -> Works:
        """A server on the image of a template, built before anything waits for the lock."""
        kept.spec.source.resolve()
        with self._changing:
            if self._running() is not plan:
                raise ClusterError("the cluster was started anew meanwhile", remedy="ask again")
            if self._main is None and plan.template is None:
                self._main = self._start(kept, first=True)
                return self._main
            self._others.append(self._start(kept, first=False))
            return self._others[-1]

    def _start(self, plan: Plan, *, first: bool) -> Works:
        # The port and the log that were asked for are the first server's.
        options = self._serving if first else replace(self._serving, port=None, log_path=None)
        return Works(PgTempDB.with_options(options, plan.spec.source).start())

    def _check_owner(self) -> None:
        # Before any lock: somebody may have held it at the fork.
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
        self._plan = plan  # for servers with this template, where it is kept
        self._clones = Clones(works.admins, dbname, works.server.user, name)
        self._pool = works.pool_of(self._clones, READY)

    def database(self) -> Database:
        """A clone of one's own, claimed from those kept ready.

        Raises:
            PgTempError: it could not be made.
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
        """A template that starts from this one; as `Cluster.template`."""
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
