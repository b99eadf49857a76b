"""Create Django's test databases: migrate a template once, and then clone it.

Django's own code runs the migrations, and creates and drops the additional clones of `--parallel`.
This module only points the connection settings at pgtemp's server while the tests run.
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

from pgtemp import libpq
from pgtemp.cluster import Cluster
from pgtemp.database import Database
from pgtemp.django import OPTIONS
from pgtemp.options.server import ServerOptions
from pgtemp.template import Template
from pgtemp.templates.recipe import Recipe
from pgtemp.uri import ConnectionInfo, PartialInfo, parse

# The files of an app that affect the migrated database. Permissions and content types are created
# from the models of all apps, even of those without migrations.
_WATCHED = ("migrations/**/*", "models.py", "models/**/*.py", "apps.py", "signals.py")
_SETTINGS = (
    "INSTALLED_APPS", "MIGRATION_MODULES", "AUTH_USER_MODEL", "DEFAULT_AUTO_FIELD",
    "DATABASE_ROUTERS", "CACHES", "LANGUAGE_CODE", "SITE_ID",
)  # fmt: skip
_WHERE = ("HOST", "PORT", "USER", "PASSWORD", "OPTIONS", "NAME")
_clusters: dict[str, Cluster] = {}
_templates: dict[Hashable, Template] = {}


class Creation(DatabaseCreation):
    """Django's creation of test databases, but with a template."""

    _database: Database | None = None
    _real: tuple[Any, ...] | None = None  # the original settings, while they are replaced

    def create_test_db(
        self,
        verbosity: int = 1,
        autoclobber: bool = False,
        serialize: bool = True,
        keepdb: bool = False,
    ) -> str:
        """Clone the migrated template, which is created if necessary; return the clone's name."""
        connection = self.connection
        given = connection.settings_dict["TEST"][OPTIONS]
        if self._real is None:
            self._real = tuple(connection.settings_dict[key] for key in _WHERE)

        def migrate(uri: str) -> None:
            self._point_at_server(parse(uri))
            super(Creation, self).create_test_db(verbosity, True, False, False)
            self._close()

        recipe = Recipe(migrate, key=self._key(), watch=[*_files(), *given["watch"]])
        try:
            self._database = _template(connection.alias, given["options"], recipe).database()
        except BaseException:
            self._point_back()
            raise
        info = self._database.info
        self._point_at_server(info)
        settings.DATABASES[connection.alias]["NAME"] = info.dbname
        if serialize:
            connection._test_serialized_contents = self.serialize_db_to_string()
        connection.ensure_connection()
        return info.dbname

    def _get_test_db_name(self) -> str:
        return str(self.connection.settings_dict["NAME"])

    def _create_test_db(self, verbosity: int, autoclobber: bool, keepdb: bool = False) -> str:
        return self._get_test_db_name()  # it already exists

    def _destroy_test_db(self, test_database_name: str, verbosity: int) -> None:
        database = self._database
        if database is None or test_database_name != database.dbname:
            super()._destroy_test_db(test_database_name, verbosity)
            return
        self._database = None
        database.close()

    def destroy_test_db(self, *args: Any, **kwargs: Any) -> None:
        """Destroy the test database as Django does, then restore the settings."""
        super().destroy_test_db(*args, **kwargs)
        if self._database is None:
            self._point_back()

    def set_as_test_mirror(self, primary_settings_dict: dict[str, Any]) -> None:
        """Use the primary's settings until the process exits."""
        self._point_at(*(primary_settings_dict[key] for key in _WHERE))

    def _point_back(self) -> None:
        if self._real is not None:
            self._point_at(*self._real)
            settings.DATABASES[self.connection.alias]["NAME"] = self._real[-1]
            self._real = None

    def _point_at_server(self, info: ConnectionInfo | PartialInfo) -> None:
        assert self._real is not None
        # Options such as sslmode and service apply to another server.
        options = {**libpq.of_the_client(self._real[-2]), **libpq.parameters()}
        self._point_at(info.host, info.port, info.user, info.password, options, info.dbname)

    def _point_at(self, *where: object) -> None:
        self._close()
        self.connection.settings_dict.update(
            (key, "" if value is None else value) for key, value in zip(_WHERE, where, strict=True)
        )

    def _close(self) -> None:
        self.connection.close()
        if hasattr(self.connection, "close_pool"):  # since Django 5.1
            self.connection.close_pool()

    def _key(self) -> str:
        """Return a hash of those inputs of the migrations that are not files of the apps."""
        values = {name: getattr(settings, name, None) for name in _SETTINGS}
        migrate = self.connection.settings_dict["TEST"].get("MIGRATE")
        text = repr((django.VERSION, self.connection.alias, migrate, values))
        return hashlib.sha256(text.encode()).hexdigest()


def _files() -> list[str]:
    """Return the files of all apps that affect the migrated database."""
    found = {
        glob.escape(str(file))
        for app in apps.get_app_configs()
        for pattern in _WATCHED
        for file in Path(app.path).glob(pattern)
        if file.is_file() and "__pycache__" not in file.parts
    }
    return sorted(found)


def _template(alias: str, options: dict[str, Any], recipe: Recipe) -> Template:
    """Return the template of an alias, in a server that runs until this process exits."""
    server = repr(sorted(options.items()))
    if server not in _clusters:
        _clusters[server] = Cluster.with_options(ServerOptions(**options)).start()
    # The recipe itself cannot be the key: each call creates a new `migrate` function, although the
    # result is the same.
    key = server, alias, recipe.fingerprint()
    if key not in _templates:
        name = f"django_{alias}" if not _templates else f"django_{alias}_{len(_templates)}"
        _templates[key] = _clusters[server].template(name, recipe)
    return _templates[key]
