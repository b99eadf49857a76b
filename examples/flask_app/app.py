"""The application: a guest book, with one connection per request."""

from typing import Any

import psycopg
from flask import Flask, g, request

SCHEMA = "CREATE TABLE guest (id int PRIMARY KEY, name text NOT NULL)"


def init_db(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(SCHEMA)


def create_app(database_url: str) -> Flask:
    app = Flask(__name__)

    def connection() -> psycopg.Connection[Any]:
        if "connection" not in g:
            g.connection = psycopg.connect(database_url)
        return g.connection  # type: ignore[no-any-return]

    @app.teardown_appcontext
    def close(error: BaseException | None) -> None:
        if (opened := g.pop("connection", None)) is not None:
            opened.close()

    @app.post("/guests/<int:number>")
    def sign(number: int) -> tuple[str, int]:
        values = [number, request.get_data(as_text=True)]
        connection().execute("INSERT INTO guest VALUES (%s, %s)", values)
        connection().commit()
        return "", 201

    @app.get("/guests")
    def guests() -> list[str]:
        rows = connection().execute("SELECT name FROM guest ORDER BY id").fetchall()
        return [name for (name,) in rows]

    return app
