"""A cluster provides many databases, each a clone of a template from a pool of ready clones.

    with Cluster() as cluster:
        app = cluster.template("app", build=migrate)
        with app.database() as db:
            psycopg.connect(db.uri)

Starting a server takes thirty milliseconds, creating a clone ten; a ready clone takes none.

Each template is built in a separate server, and its clones are in another server, which starts on
the image of the first. If the result of a template follows from its inputs, the image is cached on
disk. The cluster's main server is the first server that was started.
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
from types import MappingProxyType
from typing import Self

from pgtemp.database import Database
from pgtemp.errors import ClusterError, OptionError
from pgtemp.options.server import ServerOptions, StrPath, takes_options
from pgtemp.pgtempdb import PgTempDB
from pgtemp.sql import server_setup
from pgtemp.sql.server_setup import Plan
from pgtemp.template import Template, recipe_of
from pgtemp.templates import builder, clones
from pgtemp.templates.builder import TemplateBuilder
from pgtemp.templates.recipe import Build, Recipe
from pgtemp.uri import ConnectionInfo

_NOT_FOR_MANY = ("dump", "load")
_RESTARTED = "the cluster was stopped and started again while the template was built"


class Cluster:
    """A PostgreSQL server for many databases. Keyword arguments are `pgtemp.ServerOptions`.

    The server starts when it is first needed. `dbname` is not used: databases are created by
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
        self._servers: list[Template] = []  # each has a server; the first is the main server
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
            templates = self._servers
            self._plan, self._servers, self._made, self._empty = None, [], {}, None
            _running.discard(self)
        with ExitStack() as all_of_them:
            for template in templates:
                all_of_them.callback(template._stop)

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
            PgTempError: the build failed; nothing is left behind. An exception of a callable is
                raised unchanged.
        """
        return self._template(name, recipe_of(build, key, watch), None)

    def database(self) -> Database:
        """Claim an empty database from the pool."""
        return self._default().database()

    @property
    def info(self) -> ConnectionInfo:
        """Host, port, user and password of the main server."""
        return self.server.info

    @property
    def server(self) -> PgTempDB:
        """The main server, with its directory, log and pid."""
        self._check_owner()
        with self._changing:
            main = self._servers[0] if self._servers else self._default()
            return main._server

    def _default(self) -> Template:
        self._check_owner()
        with self._changing:
            if self._empty is None:
                self._empty = self._start(self._running(), "empty", self._running(), None)
            return self._empty

    def _template(self, name: str, recipe: Recipe, parent: Template | None) -> Template:
        """Build each template once; concurrent callers wait for the build and get its error."""
        self._check_owner()
        clones.check_name(name)
        if parent is not None and recipe.data_dir is not None:
            raise OptionError(
                f"{recipe.data_dir} is a data directory, which cannot start from {parent.name!r}",
                remedy="create it with Cluster.template()",
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
                    remedy="use a different name for each template",
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
        planned, built = builder.build(start, name, recipe)
        try:
            return self._start(plan, name, planned, built)
        except BaseException:
            if built is not None:
                built.close()
            raise

    def _start(
        self, plan: Plan, name: str, planned: Plan, built: TemplateBuilder | None
    ) -> Template:
        """Start a server with a template.

        Args:
            plan: the cluster's plan when the template was requested.
            planned: the plan of servers with the template.
            built: the builder that owns its image, if the image is not cached.
        """
        with self._changing:
            if self._running() is not plan:
                raise ClusterError(_RESTARTED, remedy="call template() again")
            # The options `port` and `log_path` apply to the first server only.
            others = replace(self._serving, port=None, log_path=None)
            options = others if self._servers else self._serving
            self._servers.append(Template(name, planned, built, options, self._template))
            return self._servers[-1]

    def _check_owner(self) -> None:
        # Check before taking a lock: another thread may have held it at the time of the fork.
        if self._owner != os.getpid():
            raise ClusterError(
                "the cluster belongs to the process that this one was forked from",
                remedy="create one in this process",
            )

    def _running(self) -> Plan:
        if self._plan is None:
            raise ClusterError("the cluster is not running", remedy="call start(), or use `with`")
        return self._plan

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return (
            f"<Cluster {self._servers[0]._server!r}>"
            if self._servers
            else "<Cluster, no server yet>"
        )


_running: weakref.WeakSet[Cluster] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for cluster in list(_running):
        cluster.stop()
