"""How Django's test databases are made: migrated once, into a template, and cloned from then on.

Django's own code migrates, and it makes and drops the further clones of `--parallel`; here it is
only shown another server for as long as the tests last.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import django
from django.apps import apps
from django.conf import settings
from django.db.backends.postgresql.creation import DatabaseCreation

from pgtemp.cluster import Cluster
from pgtemp.database import Database
from pgtemp.databases.recipe import Recipe
from pgtemp.django import OPTIONS
from pgtemp.options import ServerOptions
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


class Creation(DatabaseCreation):
    """Django's, with a template."""

    _database: Database | None = None
    _real: dict[str, Any]

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
        self._real = {key: connection.settings_dict[key] for key in _WHERE}

        def migrate(uri: str) -> None:
            said = parse(uri)
            self._point_at(said.host, said.port, said.user, said.password, said.dbname)
            super(Creation, self).create_test_db(verbosity, True, False, False)
            self._close()

        recipe = Recipe(migrate, key=self._key(), watch=[*_files(), *given["watch"]])
        template = _cluster(given["options"]).template(f"django_{connection.alias}", recipe)
        self._database = template.database()
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
        self._point_at(*(self._real[key] for key in _WHERE))

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
        str(file)
        for app in apps.get_app_configs()
        for pattern in _DECIDES
        for file in Path(app.path).glob(pattern)
        if file.is_file() and "__pycache__" not in file.parts
    }
    return sorted(found)


def _cluster(options: dict[str, Any]) -> Cluster:
    """The server of this process for some options; it ends with the process."""
    key = repr(sorted(options.items()))
    if key not in _clusters:
        _clusters[key] = Cluster.with_options(ServerOptions(**options)).start()
    return _clusters[key]
