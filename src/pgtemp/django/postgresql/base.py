"""The module that Django imports: its own engine, except that pgtemp creates test databases."""

from __future__ import annotations

from django.db.backends.postgresql import base

from pgtemp.django.creation import Creation


class DatabaseWrapper(base.DatabaseWrapper):
    creation_class = Creation
