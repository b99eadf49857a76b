"""psycopg 3 and its pool."""

import asyncio
import threading

import psycopg
import pytest
from psycopg import errors
from psycopg_pool import ConnectionPool

IS_ASLEEP = "SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = %s"


def count(connection: psycopg.Connection) -> int:
    return connection.execute("SELECT count(*) FROM book").fetchone()[0]


def test_each_connection_has_its_own_database(uri: str) -> None:
    with psycopg.connect(uri) as first, psycopg.connect(uri) as second:
        first.execute("INSERT INTO book (title) VALUES ('one')")
        first.commit()
        assert (count(first), count(second)) == (1, 0)


def test_a_pool_shares_the_database_of_its_session(session: str) -> None:
    with ConnectionPool(session, min_size=4) as pool:
        with pool.connection() as connection:
            connection.execute("INSERT INTO book (title) VALUES ('one')")
        connections = [pool.getconn() for _ in range(4)]
        assert [count(connection) for connection in connections] == [1, 1, 1, 1]
        for connection in connections:
            pool.putconn(connection)


def test_two_sessions_do_not_see_each_other(new_session) -> None:
    with psycopg.connect(new_session()) as one, psycopg.connect(new_session()) as other:
        one.execute("INSERT INTO book (title) VALUES ('one')")
        one.commit()
        assert (count(one), count(other)) == (1, 0)


def test_cancelled(session: str) -> None:
    with (
        psycopg.connect(session, autocommit=True) as connection,
        psycopg.connect(session, autocommit=True) as other,
    ):

        def cancel() -> None:
            while other.execute(IS_ASLEEP, [connection.info.backend_pid]).fetchone() != (True,):
                pass
            connection.cancel_safe()

        helper = threading.Thread(target=cancel)
        helper.start()
        with pytest.raises(errors.QueryCanceled):
            connection.execute("SELECT pg_sleep(60)")
        helper.join()
        assert count(connection) == 0


async def test_cancelled_by_asyncio(uri: str) -> None:
    connection = await psycopg.AsyncConnection.connect(uri, autocommit=True)
    async with connection:
        await connection.execute("INSERT INTO book (title) VALUES ('one')")
        with pytest.raises(TimeoutError):  # psycopg sends the cancel request itself
            await asyncio.wait_for(connection.execute("SELECT pg_sleep(60)"), 0.2)
        cursor = await connection.execute("SELECT count(*) FROM book")
        assert await cursor.fetchone() == (1,)


def test_an_error_keeps_its_sqlstate(uri: str) -> None:
    with psycopg.connect(uri) as connection:
        connection.execute("INSERT INTO book (title) VALUES ('one')")
        with pytest.raises(errors.UniqueViolation) as caught:
            connection.execute("INSERT INTO book (title) VALUES ('one')")
        assert caught.value.sqlstate == "23505"
        assert caught.value.diag.constraint_name == "book_title_key"
