"""Where Django looks for the engine: its own, but for how test databases are made."""

from __future__ import annotations

from django.db.backends.postgresql import base

from pgtemp.django.creation import Creation


class DatabaseWrapper(base.DatabaseWrapper):
    creation_class = Creation
