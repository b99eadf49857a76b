"""asyncpg and its pool."""

import asyncpg
import pytest

COUNT = "SELECT count(*) FROM book"


async def test_each_connection_has_its_own_database(uri: str) -> None:
    first, second = await asyncpg.connect(uri), await asyncpg.connect(uri)
    await first.execute("INSERT INTO book (title) VALUES ('one')")
    assert await first.fetchval(COUNT) == 1
    assert await second.fetchval(COUNT) == 0
    await first.close()
    await second.close()


async def test_a_pool_shares_the_database_of_its_session(session: str) -> None:
    async with asyncpg.create_pool(session, min_size=4, max_size=4) as pool:
        await pool.execute("INSERT INTO book (title) VALUES ('one')")
        connections = [await pool.acquire() for _ in range(4)]
        assert [await connection.fetchval(COUNT) for connection in connections] == [1, 1, 1, 1]
        for connection in connections:
            await pool.release(connection)


async def test_two_sessions_do_not_see_each_other(new_session) -> None:
    async with asyncpg.create_pool(new_session()) as one, asyncpg.create_pool(new_session()) as two:
        await one.execute("INSERT INTO book (title) VALUES ('one')")
        assert await one.fetchval(COUNT) == 1
        assert await two.fetchval(COUNT) == 0


async def test_cancelled(uri: str) -> None:
    connection = await asyncpg.connect(uri)
    await connection.execute("INSERT INTO book (title) VALUES ('one')")
    with pytest.raises(TimeoutError):
        await connection.execute("SELECT pg_sleep(60)", timeout=0.2)
    assert await connection.fetchval(COUNT, timeout=20) == 1  # without waiting for pg_sleep
    await connection.close()


async def test_an_error_keeps_its_sqlstate(uri: str) -> None:
    connection = await asyncpg.connect(uri)
    await connection.execute("INSERT INTO book (title) VALUES ('one')")
    with pytest.raises(asyncpg.UniqueViolationError) as caught:
        await connection.execute("INSERT INTO book (title) VALUES ('one')")
    assert caught.value.sqlstate == "23505"
    await connection.close()
