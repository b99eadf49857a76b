"""The few SQL statements pgtemp needs, over psycopg, on the server's private socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import errors, sql

from pgtemp.databases.secret import Secret
from pgtemp.errors import ClusterError
from pgtemp.uri import ConnectionInfo

# What libpq would else take from the caller's variables: PGHOSTADDR alone would lead elsewhere.
_NOT_FROM_THE_ENVIRONMENT: dict[str, Any] = {
    "hostaddr": "",
    "options": "",
    "require_auth": "",
    "target_session_attrs": "any",
    "sslmode": "disable",
    "gssencmode": "disable",
    "client_encoding": "UTF8",
}


@contextmanager
def connected(to: ConnectionInfo) -> Iterator[psycopg.Connection[Any]]:
    """An autocommit connection that turns what goes wrong into a ClusterError."""
    try:
        with psycopg.connect(
            host=to.host,
            port=to.port,
            user=to.user,
            dbname=to.dbname,
            autocommit=True,
            application_name="pgtemp",
            **_NOT_FROM_THE_ENVIRONMENT,
        ) as connection:
            yield connection
    except psycopg.Error as error:
        raise ClusterError(f"PostgreSQL at {to.host} refused: {str(error).strip()}") from error


def ensure_role(connection: psycopg.Connection[Any], user: str, secret: Secret | None) -> None:
    """Make `user` a superuser that can log in, with this password; it may exist already."""
    clauses = sql.SQL("{} SUPERUSER LOGIN").format(sql.Identifier(user))
    if secret is not None:
        # A verifier, not the password: statements may be logged.
        verifier = (
            secret.verifier
            or connection.pgconn.encrypt_password(
                secret.password.encode(), user.encode(), b"scram-sha-256"
            ).decode()
        )
        clauses += sql.SQL(" PASSWORD {}").format(sql.Literal(verifier))
    try:
        connection.execute(sql.SQL("ALTER ROLE {}").format(clauses))
    except errors.UndefinedObject:
        connection.execute(sql.SQL("CREATE ROLE {}").format(clauses))


def ensure_database(connection: psycopg.Connection[Any], dbname: str, owner: str) -> None:
    """Make a database unless it exists."""
    if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [dbname]).fetchone():
        return
    # The files are copied rather than logged: half the time from a small template.
    connection.execute(
        sql.SQL("CREATE DATABASE {} OWNER {} STRATEGY file_copy").format(
            sql.Identifier(dbname), sql.Identifier(owner)
        )
    )
