"""Every test opens account 1 and commits, which works because each has its own database."""

import bank
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from pgtemp import Database


def test_sync(pgtemp: Database) -> None:
    connection = pgtemp.connect()  # pgtemp closes it with the database
    bank.open_account(connection, 1, 100)
    assert bank.total(connection) == 100


async def test_async(pgtemp: Database) -> None:
    connection = await pgtemp.aconnect()
    await bank.aopen_account(connection, 1, 200)
    assert await bank.atotal(connection) == 200


def test_pool(pool: ConnectionPool) -> None:
    with pool.connection() as one, pool.connection() as other:
        bank.open_account(one, 1, 300)
        assert bank.total(other) == 300


async def test_async_pool(async_pool: AsyncConnectionPool) -> None:
    async with async_pool.connection() as one, async_pool.connection() as other:
        await bank.aopen_account(one, 1, 400)
        assert await bank.atotal(other) == 400
