"""The application: a club and its members."""

import psycopg

SCHEMA = "CREATE TABLE member (id int PRIMARY KEY, name text NOT NULL)"


class Club:
    def __init__(self, url: str) -> None:
        self._url = url

    def join(self, number: int, name: str) -> None:
        with psycopg.connect(self._url) as connection:
            connection.execute("INSERT INTO member VALUES (%s, %s)", [number, name])

    def names(self) -> list[str]:
        with psycopg.connect(self._url) as connection:
            rows = connection.execute("SELECT name FROM member ORDER BY id").fetchall()
        return [name for (name,) in rows]
