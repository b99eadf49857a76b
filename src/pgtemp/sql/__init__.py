"""What pgtemp says to a server as its superuser, and programs such as pg_dump."""
