"""The application: accounts, through psycopg."""

from decimal import Decimal
from typing import Any

from psycopg import AsyncConnection, Connection

_OPEN = "INSERT INTO account VALUES (%s, %s)"
_TOTAL = "SELECT sum(balance) FROM account"


def open_account(connection: Connection[Any], number: int, balance: int) -> None:
    connection.execute(_OPEN, [number, balance])
    connection.commit()


def total(connection: Connection[Any]) -> Decimal:
    row = connection.execute(_TOTAL).fetchone()
    assert row is not None
    return Decimal(row[0])


async def aopen_account(connection: AsyncConnection[Any], number: int, balance: int) -> None:
    await connection.execute(_OPEN, [number, balance])
    await connection.commit()


async def atotal(connection: AsyncConnection[Any]) -> Decimal:
    row = await (await connection.execute(_TOTAL)).fetchone()
    assert row is not None
    return Decimal(row[0])
