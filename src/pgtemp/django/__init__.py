"""Django: test databases that are clones of a template, instead of being migrated each time.

    DATABASES = pgtemp.django.databases(DATABASES)

in the settings. `manage.py test` and pytest-django then start a server of their own, migrate once,
and then clone the migrated database until a migration or a model changes. All other commands of
Django use the database of the settings, as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pgtemp.errors import OptionError

# Django's engines, and pgtemp's engines that replace them.
_ENGINES = {
    "django.db.backends.postgresql": "pgtemp.django.postgresql",
    "django.contrib.gis.db.backends.postgis": "pgtemp.django.postgis",
}
OPTIONS = "PGTEMP"  # the key in TEST for the arguments of `databases`


def databases(
    settings: Mapping[str, Mapping[str, Any]], *, watch: Sequence[str] = (), **options: Any
) -> dict[str, dict[str, Any]]:
    """Return settings with which pgtemp provides the PostgreSQL databases of tests.

    Args:
        settings: Django's DATABASES; databases with other engines are returned unchanged.
        watch: glob patterns of files, in addition to migrations and models, that affect the
            migrated database.
        options: the options of the server, see `pgtemp.ServerOptions`.

    Raises:
        OptionError: no database has a PostgreSQL engine.
    """
    if not any(one.get("ENGINE") in _ENGINES for one in settings.values()):
        raise OptionError(
            "none of the DATABASES has a PostgreSQL engine",
            remedy="use one of the engines that pgtemp replaces: " + " or ".join(_ENGINES),
        )
    return {
        alias: {
            **one,
            "ENGINE": _ENGINES[one["ENGINE"]],
            "TEST": {**one.get("TEST", {}), OPTIONS: {"watch": list(watch), "options": options}},
        }
        if one.get("ENGINE") in _ENGINES
        else dict(one)
        for alias, one in settings.items()
    }
