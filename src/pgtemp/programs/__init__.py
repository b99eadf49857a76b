"""Find PostgreSQL's programs, and make them usable for the server user."""
