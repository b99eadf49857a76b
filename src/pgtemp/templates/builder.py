"""A builder starts a separate server in which a template is built. The result is an image.

A failed build therefore leaves nothing in any other server, and the image contains, in addition to
the database, the roles and settings that the build creates. If the result of a recipe follows from
its parts, the image is stored in the cache, so that it is built once per machine. Other images
exist as long as their builder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pgtemp.errors import ClusterError
from pgtemp.host import ports
from pgtemp.host.progress import step
from pgtemp.host.tree import Tree
from pgtemp.images import cache, publish
from pgtemp.images.image import Image
from pgtemp.images.source import Directory, Source
from pgtemp.server.postmaster import Postmaster
from pgtemp.sql import admin_sql, server_setup
from pgtemp.sql.connection import connected
from pgtemp.sql.passwords import STRONG_ITERATIONS, random_secret
from pgtemp.sql.persisted_note import read_note
from pgtemp.sql.server_setup import Plan
from pgtemp.sql.timeouts import LONG_SECONDS
from pgtemp.templates.recipe import Recipe
from pgtemp.uri import ConnectionInfo
from pgtemp.wire.startup import clip

TEMPLATE = "pgtemp_template"  # the name of the sealed database in the image of a template
# The name of the database during the build, if the requested name is reserved.
_BUILDING = "pgtemp_building"
_TAKEN = (*admin_sql.ALWAYS_THERE, TEMPLATE)


class TemplateBuilder:
    """A server with one database to build in."""

    def __init__(self, plan: Plan, name: str) -> None:
        """Prepare a builder; `open` starts the server.

        Args:
            plan: the plan of the server; if its source contains a template, the build starts from
                that template.
            name: the name of the template, and of the database during the build.
        """
        self._plan = plan
        self._conf = ""
        self.dbname = _BUILDING if name in _TAKEN else clip(name)
        self.postmaster: Postmaster
        self.info: ConnectionInfo

    def open(self) -> None:
        """Start the server and create the database.

        Raises:
            PgTempError: one of these steps failed; nothing is left behind.
        """
        plan, user = self._plan, self._plan.options.user
        # A build may use any client, and some clients refuse verifiers with few iterations.
        secret = random_secret(STRONG_ITERATIONS)
        spec = replace(
            plan.spec, conf=self._record_conf, addresses=(ports.LOOPBACK,), port=None,
            keep=False, ttl=None, log_path=None,
        )  # fmt: skip
        self.postmaster = server_setup.start(replace(plan, spec=spec), secret)
        try:
            server_setup.prepare_database(self.postmaster, plan, self.dbname, user)
        except BaseException:
            self.close()
            raise
        self.info = ConnectionInfo(
            host=ports.LOOPBACK,
            port=self.postmaster.port,
            user=user,
            password=secret.password,
            dbname=self.dbname,
        )

    def apply(self, recipe: Recipe) -> None:
        """Apply a recipe to the database. Raises the errors of `Recipe.apply`."""
        recipe.apply(self._plan.installation, self._inside(), self.info)

    def seal(self) -> Image:
        """Seal the database and shut the server down; the image lasts until `close`."""
        # This connection also creates the relation cache that clones contain. VACUUM FREEZE sets
        # all hint bits, so that a session that only reads a clone writes no page.
        with (
            connected(self._inside()) as connection,
            connection.given(LONG_SECONDS),
        ):
            connection.execute("VACUUM (FREEZE)")
        with server_setup.administered(self.postmaster, self._plan) as connection:
            connection.execute("SELECT 1")
            admin_sql.seal(connection, self.dbname, TEMPLATE, self._inside())
        self.postmaster.halt()
        # A server that starts on the image gets its own settings, so the image contains those of
        # initdb.
        made = publish.shut_down(
            self.postmaster.home.path,
            self._plan.installation,
            self._plan.spec.owner,
            conf=self._conf,
        )
        with Tree.open(self.postmaster.data_dir) as data:
            made.learn(data)
        return made

    def close(self) -> None:
        """Stop the server, and remove its run directory and its image."""
        server_setup.discard(self.postmaster)

    def _inside(self) -> ConnectionInfo:
        return server_setup.private_info(self.postmaster, self._plan.superuser, self.dbname)

    def _record_conf(self, existing: str) -> str:
        """Return the server's settings, and store the original ones of the data directory."""
        self._conf = existing
        return self._plan.spec.conf(existing)


@contextmanager
def _opened(plan: Plan, name: str) -> Iterator[TemplateBuilder]:
    builder = TemplateBuilder(plan, name)
    builder.open()
    try:
        yield builder
    finally:
        builder.close()


@dataclass(frozen=True, slots=True)
class Lasting(cache.Ensured):
    """The image of a template, stored in the cache under the hash of its inputs."""

    plan: Plan
    name: str
    recipe: Recipe
    fingerprint: str

    @property
    def identity(self) -> str:
        plan = self.plan
        return cache.key_of(
            plan.spec.source.identity,
            plan.installation.identity,
            plan.spec.conf(""),
            plan.options.user,
            self.name,
            self.fingerprint,
            plan.installation.extensions_stamp(),
            *plan.spec.owner.made_as,
        )

    def resolve(self) -> Image:
        """Return the image; build the template if it does not exist. Raises PgTempError."""
        return cache.ensure(
            cache.name_of(self.plan.installation.major, self.identity, self.recipe.run),
            f"building template {self.name}",
            self._build,
        )

    def _build(self, path: Path, lock: int) -> None:
        self._check_unchanged()
        with _opened(self.plan, self.name) as builder:
            builder.apply(self.recipe)
            made = builder.seal()
            self._check_unchanged()
            publish.publish(made, path, lock)

    def _check_unchanged(self) -> None:
        """Raise ClusterError if the recipe's files have changed since their hash was computed."""
        if self.recipe.fingerprint() != self.fingerprint:
            raise ClusterError(
                f"the files of template {self.name} have changed since they were first read",
                remedy="start again",
            )


def lasting(plan: Plan, name: str, recipe: Recipe) -> Plan | None:
    """Return a plan for servers with a template that can be cached.

    The template is built when the first of these servers starts.

    Args:
        plan: the plan of servers without the template; if their source contains a template, the
            build starts from it.

    Returns:
        The plan; None if the recipe's result does not follow from its parts, so that it cannot be
        cached.

    Raises:
        OptionError: a file does not exist."""
    if isinstance(plan.spec.source, Image):
        return None  # it starts from a template that is not cached
    if (data_dir := recipe.data_dir) is not None:
        server_setup.check_copied(data_dir, plan.installation)
        plan = replace(
            plan,
            spec=replace(plan.spec, source=Directory(data_dir)),
            template=read_note(data_dir.parent).dbname,
            plain=False,
        )
        recipe = replace(recipe, build=())
    fingerprint = recipe.fingerprint()
    if fingerprint is None:
        return None
    plain = plan.plain and recipe == Recipe()
    return _with_source(plan, Lasting(plan, name, recipe, fingerprint), plain=plain)


def build(plan: Plan, name: str, recipe: Recipe) -> tuple[Plan, TemplateBuilder | None]:
    """Build a template now and return a plan for servers with it.

    Returns:
        The plan and, if the template is not cached, its builder, which the caller must close after
        it has stopped the last of these servers.

    Raises:
        PgTempError: the build failed; nothing is left behind. An error of a callable is raised
            unchanged.
    """
    planned = lasting(plan, name, recipe)
    if planned is not None:
        planned.spec.source.resolve()
        return planned, None
    builder = TemplateBuilder(plan, name)
    builder.open()
    try:
        with step(f"building template {name}"):
            builder.apply(recipe)
            return sealed(plan, builder), builder
    except BaseException:
        builder.close()
        raise


def sealed(plan: Plan, builder: TemplateBuilder) -> Plan:
    """Seal a builder's template and return a plan for servers with it."""
    return _with_source(plan, builder.seal(), plain=False)


def _with_source(plan: Plan, source: Source, *, plain: bool) -> Plan:
    spec = replace(plan.spec, source=source)
    return replace(plan, spec=spec, template=TEMPLATE, plain=plain)
