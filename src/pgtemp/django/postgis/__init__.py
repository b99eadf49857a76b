"""The engine that stands in for django.contrib.gis.db.backends.postgis."""
