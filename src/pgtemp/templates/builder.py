"""A workshop: a server of its own in which a template is built. What it leaves is an image.

Nothing of a build that fails can be anywhere else, and roles and settings that a build makes come
along with its database. What a recipe makes whose outcome can be told from its parts is kept in
the cache, so that it is built once on this machine; the rest lasts as long as its workshop.
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
from pgtemp.images import cache, image, initdb
from pgtemp.images.image import Image
from pgtemp.server.postmaster import Postmaster
from pgtemp.sql import admin_connections, admin_sql, server_setup
from pgtemp.sql.answer_limits import LONG_SECONDS
from pgtemp.sql.passwords import STRONG_ROUNDS, random_secret
from pgtemp.sql.persisted_note import read_note
from pgtemp.sql.server_setup import Plan
from pgtemp.templates.recipe import Recipe
from pgtemp.uri import ConnectionInfo

TEMPLATE = "pgtemp_template"  # the name of the sealed database in the image of a template
_BUILDING = "pgtemp_building"  # where the name that was given is taken
_TAKEN = (*admin_sql.ALWAYS_THERE, TEMPLATE)


class TemplateBuilder:
    """A server with one database to build in."""

    def __init__(self, plan: Plan, name: str) -> None:
        """Nothing is started yet.

        Args:
            plan: what the server is made from; a template in its source is what the build begins
                with.
            name: of the template, and of the database while it is built.
        """
        self._plan = plan
        self._conf = ""
        self.dbname = _BUILDING if name in _TAKEN else name
        self.postmaster: Postmaster
        self.info: ConnectionInfo

    def open(self) -> None:
        """Start the server and make the database.

        Raises:
            PgTempError: it could not be made; nothing of it is left.
        """
        plan, user = self._plan, self._plan.options.user
        # A build's client may be any; some refuse verifiers of few rounds.
        secret = random_secret(STRONG_ROUNDS)
        spec = replace(
            plan.spec, conf=self._remember, addresses=(ports.LOOPBACK,), port=None,
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
        """Build. Raises what the recipe raises."""
        recipe.apply(self._plan.installation, self._inside(), self.info)

    def seal(self) -> Image:
        """Seal the database and shut the server down; the image lasts until `close`."""
        # Clones come with a relation cache, since somebody was connected; and who only reads one
        # changes nothing in it, not even a hint (unmodified.py).
        with (
            admin_connections.connected(self._inside()) as connection,
            connection.given(LONG_SECONDS),
        ):
            connection.execute("VACUUM (FREEZE)")
        with server_setup.administered(self.postmaster, self._plan) as connection:
            connection.execute("SELECT 1")
            admin_sql.seal(connection, self.dbname, TEMPLATE, self._inside())
        self.postmaster.halt()
        # A server that starts on the image has settings of its own, so these are not in it.
        made = initdb.shut_down(
            self.postmaster.home.path,
            self._plan.installation,
            self._plan.spec.owner,
            conf=self._conf,
        )
        with Tree.open(self.postmaster.data_dir) as data:
            made.learn(data)
        return made

    def close(self) -> None:
        """End the server, and remove it and its image."""
        server_setup.discard(self.postmaster)

    def _inside(self) -> ConnectionInfo:
        return server_setup.private_info(self.postmaster, self._plan.superuser, self.dbname)

    def _remember(self, existing: str) -> str:
        self._conf = existing
        return self._plan.spec.conf(existing)


@contextmanager
def _opened(plan: Plan, name: str) -> Iterator[TemplateBuilder]:
    workshop = TemplateBuilder(plan, name)
    workshop.open()
    try:
        yield workshop
    finally:
        workshop.close()


@dataclass(frozen=True, slots=True)
class Lasting(cache.Ensured):
    """The image of a template, kept in the cache under the hash of what it is made from."""

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
        """The image; builds the template where there is none. Raises PgTempError."""
        return cache.ensure(
            cache.name_of(self.plan.installation.major, self.identity, self.recipe.run),
            f"building template {self.name}",
            self._build,
        )

    def _build(self, path: Path, lock: int) -> None:
        self._check_unchanged()
        with _opened(self.plan, self.name) as workshop:
            workshop.apply(self.recipe)
            made = workshop.seal()
            self._check_unchanged()
            initdb.publish(made, path, lock)

    def _check_unchanged(self) -> None:
        """Nothing is kept under the hash of what it was not made from."""
        if self.recipe.fingerprint() != self.fingerprint:
            raise ClusterError(
                f"what template {self.name} is made from has changed since it was first looked at",
                remedy="start again",
            )


def lasting(plan: Plan, name: str, recipe: Recipe) -> Plan | None:
    """A plan for servers that have a template, which is built when the first of them starts.

    Args:
        plan: for servers without it; a template in their source is what the build begins with.

    Returns:
        None where it cannot be told how the recipe comes out, so that it cannot be kept.

    Raises:
        OptionError: a file is missing.
    """
    if isinstance(plan.spec.source, image.Image):
        return None  # it begins with what is not kept itself
    if (data_dir := recipe.data_dir) is not None:
        server_setup.check_copied(data_dir, plan.installation)
        plan = replace(
            plan,
            spec=replace(plan.spec, source=image.Directory(data_dir)),
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
    """A plan for servers that have a template, which is built now.

    Returns:
        The plan, and the workshop to close in the end where the template is not kept.

    Raises:
        PgTempError: the build failed; nothing of it is left. A callable's own error comes as it is.
    """
    planned = lasting(plan, name, recipe)
    if planned is not None:
        planned.spec.source.resolve()
        return planned, None
    workshop = TemplateBuilder(plan, name)
    workshop.open()
    try:
        with step(f"building template {name}"):
            workshop.apply(recipe)
            return sealed(plan, workshop), workshop
    except BaseException:
        workshop.close()
        raise


def sealed(plan: Plan, workshop: TemplateBuilder) -> Plan:
    """A plan for servers that have the template of a workshop."""
    return _with_source(plan, workshop.seal(), plain=False)


def _with_source(plan: Plan, source: image.Source, *, plain: bool) -> Plan:
    spec = replace(plan.spec, source=source)
    return replace(plan, spec=spec, template=TEMPLATE, plain=plain)
