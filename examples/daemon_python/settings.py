"""The settings of the project: Django's own engine, with the database of DATABASE_URL."""

import os
from urllib.parse import urlsplit

_URL = urlsplit(os.environ["DATABASE_URL"])

INSTALLED_APPS = ["library"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
SECRET_KEY = "not a secret, since this is an example"
USE_TZ = True

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": _URL.hostname,
        "PORT": _URL.port,
        "USER": _URL.username,
        "NAME": _URL.path.removeprefix("/"),
        "OPTIONS": {"pool": {"min_size": 1, "max_size": 4}},
    }
}
