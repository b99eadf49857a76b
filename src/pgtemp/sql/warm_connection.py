"""A connection for a user of the library, opened before it is requested."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psycopg

from pgtemp import libpq
from pgtemp.sql.connection import has_unread_input
from pgtemp.uri import ConnectionInfo


@dataclass(frozen=True, slots=True)
class WarmConnection:
    """A connection that was opened in advance, in the way its user would have opened it.

    Attributes:
        environment: the variables of libpq when it was opened.
    """

    connection: psycopg.Connection[Any]
    environment: frozenset[tuple[str, str]]

    def is_usable(self) -> bool:
        """Return whether it is open and the environment would still lead to the same connection."""
        return self.environment == _libpq_environment() and not has_unread_input(self.connection)


def open_warm(info: ConnectionInfo) -> WarmConnection:
    """Open a warm connection. Raises psycopg's errors.

    It prepares a statement and discards it. This fills the backend's caches, which the client's
    first statement would otherwise have to fill.
    """
    environment = _libpq_environment()
    connection = libpq.connect(psycopg.Connection, info, {})
    try:
        for statement in (b"SELECT $1::int4, $2::text", b""):
            connection.pgconn.prepare(b"", statement)
    except BaseException:
        connection.close()
        raise
    if environment != _libpq_environment():  # it is unknown which of the two libpq has read
        environment = frozenset()
    return WarmConnection(connection, environment)


def _libpq_environment() -> frozenset[tuple[str, str]]:
    """Return the environment variables of libpq, and one constant pair.

    The pair makes the result differ from the empty set, which stands for an unknown environment.
    """
    return frozenset([("", ""), *(pair for pair in os.environ.items() if pair[0].startswith("PG"))])
