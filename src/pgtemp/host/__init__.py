"""Operating system services; this package does not depend on PostgreSQL."""
