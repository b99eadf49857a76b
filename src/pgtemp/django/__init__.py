"""Django: test databases that are clones of a template, instead of being migrated each time.

    DATABASES = pgtemp.django.databases(DATABASES)

in the settings. `manage.py test` and pytest-django then start a server of their own, migrate once,
and clone from then on, until a migration or a model changes. Everything else that Django does
goes to the database of the settings, as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pgtemp.errors import OptionError

# Django's engines, and ours that stand in for them.
_ENGINES = {
    "django.db.backends.postgresql": "pgtemp.django.postgresql",
    "django.contrib.gis.db.backends.postgis": "pgtemp.django.postgis",
}
OPTIONS = "PGTEMP"  # the key, in TEST, of what `databases` was given


def databases(
    settings: Mapping[str, Mapping[str, Any]], *, watch: Sequence[str] = (), **options: Any
) -> dict[str, dict[str, Any]]:
    """Settings whose PostgreSQL databases are pgtemp's in tests.

    Args:
        settings: as of Django's DATABASES; databases of other engines stay as they are.
        watch: glob patterns of files, beside migrations and models, that decide how a migrated
            database comes out.
        options: of the server, as of `pgtemp.ServerOptions`.

    Raises:
        OptionError: no database is PostgreSQL's.
    """
    if not any(one.get("ENGINE") in _ENGINES for one in settings.values()):
        raise OptionError(
            "none of the DATABASES has an engine of PostgreSQL's",
            remedy="pgtemp takes the place of " + " and ".join(_ENGINES),
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
