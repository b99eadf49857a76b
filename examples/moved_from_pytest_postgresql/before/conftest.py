"""pytest-postgresql: one server for the test session, with two kinds of databases."""

from pathlib import Path
from typing import Any

import psycopg
from pytest_postgresql import factories

HERE = Path(__file__).parent


def add_products(**connect: Any) -> None:
    with psycopg.connect(**connect) as connection:
        connection.execute("INSERT INTO product VALUES (1, 'tea', 2), (2, 'coffee', 3)")


postgresql_proc = factories.postgresql_proc(load=[HERE / "schema.sql", add_products])
postgresql = factories.postgresql("postgresql_proc")

# The same server, with a second template that is based on the first.
postgresql_with_sales = factories.postgresql_noproc(
    depends_on="postgresql_proc", load=[HERE / "sales.sql"]
)
with_sales = factories.postgresql("postgresql_with_sales")
