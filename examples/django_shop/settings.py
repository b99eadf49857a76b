"""The settings of the project; the last line adds pgtemp."""

import os

import pgtemp.django

INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "shop"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
SECRET_KEY = "not a secret, since this is an example"
USE_TZ = True

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": os.environ.get("SHOP_DB_HOST", "db.example.org"),
        "NAME": "shop",
        "USER": "shop",
    }
}
# Tests use a clone of a template that is migrated once; other commands use the database above.
DATABASES = pgtemp.django.databases(DATABASES)
