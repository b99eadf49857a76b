"""One PostgreSQL server: its configuration, its run directory, its postmaster and its status."""
