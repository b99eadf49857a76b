"""The engine that stands in for django.db.backends.postgresql."""
