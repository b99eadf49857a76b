"""Cached data directories that servers start on copies of."""
