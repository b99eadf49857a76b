"""The engine that replaces django.db.backends.postgresql."""
