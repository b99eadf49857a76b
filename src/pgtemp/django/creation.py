"""How Django's test databases are made: migrated once, into a template, and cloned from then on.

Django's own code migrates, and it makes and drops the further clones of `--parallel`; here it is
only shown another server for as long as the tests last.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import django
from django.apps import apps
from django.conf import settings
from django.db.backends.postgresql.creation import DatabaseCreation

from pgtemp.cluster import Cluster, Template
from pgtemp.database import Database
from pgtemp.django import OPTIONS
from pgtemp.options.server import ServerOptions
from pgtemp.templates.recipe import Recipe
from pgtemp.uri import parse

# What decides, in an app, how a migrated database comes out. Permissions and content types are
# made from the models of all apps, migrated or not.
_DECIDES = ("migrations/**/*", "models.py", "models/**/*.py", "apps.py", "signals.py")
_SETTINGS = (
    "INSTALLED_APPS", "MIGRATION_MODULES", "AUTH_USER_MODEL", "DEFAULT_AUTO_FIELD",
    "DATABASE_ROUTERS", "CACHES", "LANGUAGE_CODE", "SITE_ID",
)  # fmt: skip
_WHERE = ("HOST", "PORT", "USER", "PASSWORD", "NAME")
_clusters: dict[str, Cluster] = {}
_templates: dict[Hashable, Template] = {}


class Creation(DatabaseCreation):
    """Django's, with a template."""

    _database: Database | None = None
    _real: tuple[Any, ...] | None = None  # where the settings point; None while they do

    def create_test_db(
        self,
        verbosity: int = 1,
        autoclobber: bool = False,
        serialize: bool = True,
        keepdb: bool = False,
    ) -> str:
        """A clone of the migrated template; migrates where there is none. Its name."""
        connection = self.connection
        given = connection.settings_dict["TEST"][OPTIONS]
        if self._real is None:
            self._real = tuple(connection.settings_dict[key] for key in _WHERE)

        def migrate(uri: str) -> None:
            said = parse(uri)
            self._point_at(said.host, said.port, said.user, said.password, said.dbname)
            super(Creation, self).create_test_db(verbosity, True, False, False)
            self._close()

        recipe = Recipe(migrate, key=self._key(), watch=[*_files(), *given["watch"]])
        try:
            self._database = _template(connection.alias, given["options"], recipe).database()
        except BaseException:
            self._point_back()
            raise
        info = self._database.info
        self._point_at(info.host, info.port, info.user, info.password, info.dbname)
        settings.DATABASES[connection.alias]["NAME"] = info.dbname
        if serialize:
            connection._test_serialized_contents = self.serialize_db_to_string()
        connection.ensure_connection()
        return info.dbname

    def _get_test_db_name(self) -> str:
        return str(self.connection.settings_dict["NAME"])

    def _create_test_db(self, verbosity: int, autoclobber: bool, keepdb: bool = False) -> str:
        return self._get_test_db_name()  # it is there already

    def _destroy_test_db(self, test_database_name: str, verbosity: int) -> None:
        database = self._database
        if database is None or test_database_name != database.dbname:
            super()._destroy_test_db(test_database_name, verbosity)
            return
        self._database = None
        database.close()

    def destroy_test_db(self, *args: Any, **kwargs: Any) -> None:
        """As Django's; afterwards the settings are what they were."""
        super().destroy_test_db(*args, **kwargs)
        if self._database is None:
            self._point_back()

    def set_as_test_mirror(self, primary_settings_dict: dict[str, Any]) -> None:
        """Go where the primary goes, for as long as the process lives."""
        self._point_at(*(primary_settings_dict[key] for key in _WHERE))

    def _point_back(self) -> None:
        if self._real is not None:
            self._point_at(*self._real)
            settings.DATABASES[self.connection.alias]["NAME"] = self._real[-1]
            self._real = None

    def _point_at(self, *where: str | int | None) -> None:
        self._close()
        self.connection.settings_dict.update(
            (key, "" if value is None else value) for key, value in zip(_WHERE, where, strict=True)
        )

    def _close(self) -> None:
        self.connection.close()
        if hasattr(self.connection, "close_pool"):  # since Django 5.1
            self.connection.close_pool()

    def _key(self) -> str:
        """What decides how migrations come out and is in no file of the apps."""
        said = {name: getattr(settings, name, None) for name in _SETTINGS}
        migrate = self.connection.settings_dict["TEST"].get("MIGRATE")
        text = repr((django.VERSION, self.connection.alias, migrate, said))
        return hashlib.sha256(text.encode()).hexdigest()


def _files() -> list[str]:
    """The files of all apps that decide how migrations come out."""
    found = {
        glob.escape(str(file))
        for app in apps.get_app_configs()
        for pattern in _DECIDES
        for file in Path(app.path).glob(pattern)
        if file.is_file() and "__pycache__" not in file.parts
    }
    return sorted(found)


def _template(alias: str, options: dict[str, Any], recipe: Recipe) -> Template:
    """The template of an alias, in the server of this process; it ends with the process."""
    where = repr(sorted(options.items()))
    if where not in _clusters:
        _clusters[where] = Cluster.with_options(ServerOptions(**options)).start()
    # The function that migrates is another one each time; what it comes to is not.
    key = where, alias, recipe.fingerprint()
    if key not in _templates:
        name = f"django_{alias}" if not _templates else f"django_{alias}_{len(_templates)}"
        _templates[key] = _clusters[where].template(name, recipe)
    return _templates[key]
