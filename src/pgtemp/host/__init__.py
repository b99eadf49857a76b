"""Operating system services; this package knows nothing of PostgreSQL."""
