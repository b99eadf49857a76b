"""The engine that replaces django.contrib.gis.db.backends.postgis."""
