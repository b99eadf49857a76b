"""One connection of pgtemp itself to a server.

It uses the server's private socket and ignores the environment variables of libpq. Every wait for
the server has a time limit (see timeouts.py).
"""

from __future__ import annotations

import itertools
import os
import re
import select
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg import errors
from psycopg.abc import Buffer, PQGen
from psycopg.adapt import Loader
from psycopg.conninfo import make_conninfo

from pgtemp import libpq
from pgtemp.errors import ClusterError, DiskFullError
from pgtemp.host import disk_space, identity
from pgtemp.host.peer_credentials import refuse_descriptors
from pgtemp.sql.timeouts import (
    ANSWER_SECONDS,
    LOCK_SECONDS,
    NoAnswerError,
    check_running,
    limited,
)
from pgtemp.supervisor.leftovers import DATA
from pgtemp.uri import ConnectionInfo

# Settings that programs such as psql depend on. They take precedence over the configuration and
# over ALTER ROLE and ALTER DATABASE ... SET.
_OF_PROGRAMS = {
    "statement_timeout": "0",
    "idle_session_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "default_transaction_read_only": "off",
    "default_transaction_isolation": r"read\ committed",
}
# Settings that pgtemp's own statements depend on.
_OF_STATEMENTS = {
    **_OF_PROGRAMS,
    "plan_cache_mode": "force_generic_plan",
    "lock_timeout": f"{LOCK_SECONDS:g}s",
    "standard_conforming_strings": "on",
}
# psycopg reports no SQLSTATE if the server refuses a connection.
_IS_RECOVERING = re.compile(
    "the database system is (in recovery mode|starting up|not yet accepting connections)"
)
_RECOVERY_SECONDS, _RECOVERY_POLL = 10.0, 0.02
_numbers = itertools.count()
T = TypeVar("T")


class _Text(Loader):
    """Reads text that may be invalid in the connection's encoding.

    All databases share the names of roles and databases. PostgreSQL does not convert text between
    equal encodings, so a name that was written in a database with another encoding arrives as the
    bytes that were written there.
    """

    def load(self, data: Buffer) -> str:
        return bytes(data).decode("utf-8", "surrogateescape")


class Connection(psycopg.Connection[Any]):
    """A connection of pgtemp itself. It is closed if a statement exceeds its time limit."""

    _seconds = ANSWER_SECONDS

    @contextmanager
    def given(self, seconds: float) -> Iterator[None]:
        """Set the time limit of each statement of a `with` block, in seconds."""
        self._seconds = seconds
        try:
            yield
        finally:
            self._seconds = ANSWER_SECONDS

    def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        """Wait as psycopg does, within the statement's time limit. Raises NoAnswerError."""
        try:
            limited_gen = limited(gen, self._seconds, lambda: check_running(self.home))
            return super().wait(limited_gen, *args, **kwargs)
        except NoAnswerError:
            self.pgconn.finish()
            raise

    @cached_property
    def _prepared_names(self) -> dict[str, bytes]:
        """The names of the prepared statements, by SQL text."""
        return {}

    @cached_property
    def home(self) -> Path:
        """The run directory of the server; it contains the socket directory."""
        return Path(self.info.host).resolve().parent

    def ask(self, statement: LiteralString, *values: str) -> psycopg.Cursor[Any]:
        """Execute a statement that is executed often; it is planned only once.

        Planning a catalog query takes ten times as long as executing it. psycopg discards its
        prepared statements at each DROP and ALTER, so this method uses SQL's PREPARE instead.

        Args:
            values: the values of the parameters $1, $2 and so on.
        """
        name = self._prepared_names.get(statement)
        if name is None:
            # A new name each time: after an interrupted PREPARE, it is unknown whether the name
            # is in use.
            name = f"ask_{next(_numbers)}".encode()
            self.execute(b"PREPARE %s AS %s" % (name, statement.encode()))
            self._prepared_names[statement] = name
        quote = psycopg.pq.Escaping(self.pgconn).escape_literal
        quoted = b", ".join(quote(value.encode()) for value in values)
        return self.execute(b"EXECUTE %s(%s)" % (name, quoted) if values else b"EXECUTE " + name)


def connect(to: ConnectionInfo, *, options: str = "") -> Connection:
    """Open an autocommit connection; wait if the server is in recovery after a crash.

    Raises psycopg.Error; its subclass NoAnswerError if the server did not answer in time.

    Args:
        options: further settings of the session, in the syntax of the program `postgres`.
    """
    deadline = time.monotonic() + _RECOVERY_SECONDS
    while True:
        try:
            given = {
                "autocommit": True,
                "application_name": "pgtemp",
                "prepare_threshold": None,
                "requirepeer": server_user(to.host),
                "options": f"{_options(_OF_STATEMENTS)} {options}",
                "connect_timeout": int(ANSWER_SECONDS),
                "sslmode": "disable",
                "gssencmode": "disable",
                "client_encoding": "UTF8",
            }
            connection = libpq.connect(Connection, to, given)
            for name in ("text", "name"):
                connection.adapters.register_loader(name, _Text)
            with socket.socket(fileno=os.dup(connection.fileno())) as connected:
                refuse_descriptors(connected)
            return connection
        except errors.ConnectionTimeout as error:
            raise NoAnswerError(
                f"the server accepted no connection within {ANSWER_SECONDS:g} s"
            ) from error
        except psycopg.OperationalError as error:
            # A server that cannot recover exits; the message is then a different one.
            if not _IS_RECOVERING.search(str(error)) or time.monotonic() > deadline:
                raise
        time.sleep(_RECOVERY_POLL)


def server_user(socket_dir: str) -> str:
    """Return the server user of a socket directory, for libpq's requirepeer.

    The check is needed because the server user can replace the socket by a link. The result is ""
    if the server user is the caller. Raises OperationalError if the directory does not exist.
    """
    try:
        uid = os.stat(f"{socket_dir}/../{DATA}").st_uid
    except OSError as error:  # the server was removed
        raise psycopg.OperationalError(f"{socket_dir}: {error.strerror}") from error
    return identity.name_of(uid) if uid != os.geteuid() else ""


def conninfo(to: ConnectionInfo, **more: str) -> str:
    """Return a connection string for a command line: through the socket, without a password.

    Args:
        more: further parameters of libpq.
    """
    given = {"requirepeer": server_user(to.host), "options": _options(_OF_PROGRAMS), **more}
    return make_conninfo(to.conninfo, **given)


def _options(settings: Mapping[str, str]) -> str:
    return " ".join(f"-c {name}={value}" for name, value in settings.items())


def has_unread_input(connection: psycopg.Connection[Any]) -> bool:
    """Return whether an idle session was closed or has received an unsolicited message.

    For example, the server may have reported that it terminated the session.
    """
    return connection.closed or bool(select.select([connection], [], [], 0)[0])


@contextmanager
def connected(to: ConnectionInfo) -> Iterator[Connection]:
    """Open a connection for a `with` block; errors of psycopg are raised as ClusterError."""
    with cluster_errors(to), connect(to) as connection:
        yield connection


@contextmanager
def cluster_errors(to: ConnectionInfo) -> Iterator[None]:
    """Raise ClusterError for an error of psycopg in a `with` block."""
    try:
        yield
    except psycopg.Error as error:
        message = str(error).strip()
        if isinstance(error, errors.DiskFull) or disk_space.says_full(message):
            path = Path(to.host).resolve()
            raise DiskFullError(
                f"{path} is full ({disk_space.free_text(path)}): {message.splitlines()[0]}",
                remedy=disk_space.REMEDY,
            ) from error
        if isinstance(error, NoAnswerError):
            raise ClusterError(
                f"PostgreSQL at {to.host}: {message}", remedy="start a new server"
            ) from error
        raise ClusterError(f"PostgreSQL at {to.host} reported an error: {message}") from error


def was_lost(error: BaseException | None) -> bool:
    """Return whether the error means that a connection broke.

    An OperationalError without an SQLSTATE comes from libpq, not from the server.
    """
    lost = isinstance(error, psycopg.OperationalError) and error.sqlstate is None
    return lost and not isinstance(error, NoAnswerError)
