"""SQL that pgtemp executes as a server's superuser, and client programs such as pg_dump."""
