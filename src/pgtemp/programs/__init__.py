"""Finding PostgreSQL's programs, and making them usable for the server's user."""
