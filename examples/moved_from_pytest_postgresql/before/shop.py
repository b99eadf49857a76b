"""The application: sales, and their turnover."""

from decimal import Decimal
from typing import Any

import psycopg


def sell(connection: psycopg.Connection[Any], sale: int, product: int) -> None:
    connection.execute("INSERT INTO sale VALUES (%s, %s)", [sale, product])
    connection.commit()


def turnover(connection: psycopg.Connection[Any]) -> Decimal:
    row = connection.execute(
        "SELECT coalesce(sum(price), 0) FROM sale JOIN product ON product.id = product"
    ).fetchone()
    assert row is not None
    return Decimal(row[0])
