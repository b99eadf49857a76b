"""pg8000, a driver in pure Python, without libpq. It does not accept a URL and has no pool."""

from contextlib import closing
from urllib.parse import urlsplit

import pg8000.native
import pytest


def connect(uri: str, **more: object) -> closing[pg8000.native.Connection]:
    parts = urlsplit(uri)
    return closing(
        pg8000.native.Connection(
            parts.username,
            host=parts.hostname,
            port=parts.port,
            database=parts.path.removeprefix("/"),
            **more,
        )
    )


def count(connection: pg8000.native.Connection) -> int:
    return connection.run("SELECT count(*) FROM book")[0][0]


def test_each_connection_has_its_own_database(uri: str) -> None:
    with connect(uri) as first, connect(uri) as second:
        first.run("INSERT INTO book (title) VALUES (:title)", title="one")
        assert (count(first), count(second)) == (1, 0)


def test_connections_share_the_database_of_their_session(session: str) -> None:
    with connect(session) as first, connect(session) as second, connect(session) as third:
        first.run("INSERT INTO book (title) VALUES ('one')")
        assert (count(second), count(third)) == (1, 1)


def test_two_sessions_do_not_see_each_other(new_session) -> None:
    with connect(new_session()) as one, connect(new_session()) as other:
        one.run("INSERT INTO book (title) VALUES ('one')")
        assert (count(one), count(other)) == (1, 0)


def test_cancelled(uri: str) -> None:
    """pg8000 does not send cancel requests; the setting makes the server cancel the statement."""
    with connect(uri, startup_params={"statement_timeout": "200"}) as connection:
        connection.run("INSERT INTO book (title) VALUES ('one')")
        with pytest.raises(pg8000.native.DatabaseError) as caught:
            connection.run("SELECT pg_sleep(60)")
        assert caught.value.args[0]["C"] == "57014"
        assert count(connection) == 1


def test_an_error_keeps_its_sqlstate(uri: str) -> None:
    with connect(uri) as connection:
        connection.run("INSERT INTO book (title) VALUES ('one')")
        with pytest.raises(pg8000.native.DatabaseError) as caught:
            connection.run("INSERT INTO book (title) VALUES ('one')")
        assert caught.value.args[0]["C"] == "23505"
