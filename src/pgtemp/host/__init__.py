"""What the operating system gives; no PostgreSQL in it."""
