"""The settings of a Django project."""

from typing import Any, assert_type

import pgtemp.django

DATABASES = {
    "default": {"ENGINE": "django.db.backends.postgresql", "NAME": "shop"},
    "log": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
}
TESTED = pgtemp.django.databases(
    DATABASES,
    watch=["fixtures/*.json"],
    version="16",
    extensions=["postgis"],
    config={"jit": "off"},
)
assert_type(TESTED, dict[str, dict[str, Any]])
DATABASES = pgtemp.django.databases(DATABASES)
