"""pgtemp's own connections: one for a block, or one for each thread at work, kept open.

On the server's private socket, and with nothing of what libpq takes from the environment. Each wait
for the server ends (see answer_limits.py).
"""

from __future__ import annotations

import itertools
import os
import re
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg import errors
from psycopg.abc import Buffer, PQGen
from psycopg.adapt import Loader
from psycopg.conninfo import make_conninfo

from pgtemp.errors import ClusterError, DiskFullError, PgTempError
from pgtemp.host import disk_space, identity
from pgtemp.host.peer_credentials import refuse_descriptors
from pgtemp.sql.answer_limits import (
    ANSWER_SECONDS,
    LOCK_SECONDS,
    NoAnswerError,
    check_running,
    limited,
)
from pgtemp.supervisor.leftovers import DATA
from pgtemp.uri import ConnectionInfo

# What libpq would else take from the caller's variables: PGHOSTADDR alone would lead elsewhere.
_NOT_FROM_THE_ENVIRONMENT: dict[str, Any] = {
    "hostaddr": "",
    "connect_timeout": int(ANSWER_SECONDS),
    "require_auth": "",
    "target_session_attrs": "any",
    "sslmode": "disable",
    "gssencmode": "disable",
    "client_encoding": "UTF8",
}
_OPTIONS = f"-c plan_cache_mode=force_generic_plan -c lock_timeout={LOCK_SECONDS:g}s"
# Beats ALTER ROLE and ALTER DATABASE ... SET: objects that a client made in the maintenance
# database must not take the place of the catalogs and their functions.
_CATALOGS_ONLY = "-c search_path=pg_catalog"
# In which a warden tells that a server has died whose connections have broken.
_MOMENTS, _MOMENT = 20, 0.01

# psycopg has no SQLSTATE of who is turned away.
_COMES_BACK = re.compile(
    "the database system is (in recovery mode|starting up|not yet accepting connections)"
)
_RECOVERY_SECONDS, _RECOVERY_POLL = 10.0, 0.02
_numbers = itertools.count()
T = TypeVar("T")


class _Text(Loader):
    """Reads text that need not be valid in the connection's encoding.

    PostgreSQL does not convert between equal encodings, so that names of roles and databases, which
    all databases share, arrive as they were written in a database of another encoding.
    """

    def load(self, data: Buffer) -> str:
        return bytes(data).decode("utf-8", "surrogateescape")


class Connection(psycopg.Connection[Any]):
    """One of pgtemp's own. A statement that gets no answer in time closes it."""

    _seconds = ANSWER_SECONDS

    @contextmanager
    def given(self, seconds: float) -> Iterator[None]:
        """Let each statement of a block take so many seconds."""
        self._seconds = seconds
        try:
            yield
        finally:
            self._seconds = ANSWER_SECONDS

    def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        """As psycopg's, within the time that a statement has. Raises NoAnswerError."""
        try:
            waiting = limited(gen, self._seconds, lambda: check_running(self.home))
            return super().wait(waiting, *args, **kwargs)
        except NoAnswerError:
            self.pgconn.finish()
            raise

    @cached_property
    def _known(self) -> dict[str, bytes]:
        """What was prepared, and under which name."""
        return {}

    @cached_property
    def home(self) -> Path:
        """The run directory of the server, in which the directory of its socket is."""
        return Path(self.info.host).resolve().parent

    def ask(self, statement: LiteralString, *values: str) -> psycopg.Cursor[Any]:
        """Execute a statement that is executed again and again; it is planned once.

        What is asked of the catalogs takes ten times as long to plan as to execute. psycopg
        forgets what it has prepared with each DROP and ALTER, so it is prepared in SQL.

        Args:
            values: of its parameters, $1 and so on.
        """
        name = self._known.get(statement)
        if name is None:
            # Another each time, since who was interrupted does not know whether it was prepared.
            name = f"ask_{next(_numbers)}".encode()
            self.execute(b"PREPARE %s AS %s" % (name, statement.encode()))
            self._known[statement] = name
        quote = psycopg.pq.Escaping(self.pgconn).escape_literal
        given = b", ".join(quote(value.encode()) for value in values)
        return self.execute(b"EXECUTE %s(%s)" % (name, given) if values else b"EXECUTE " + name)


def connect(to: ConnectionInfo, *, options: str = "") -> Connection:
    """An autocommit connection of pgtemp's own; waits for a server that has crashed and comes back.

    Args:
        options: further settings of the session, as of the program `postgres`.

    Raises psycopg's errors; NoAnswerError if the server does not answer.
    """
    deadline = time.monotonic() + _RECOVERY_SECONDS
    while True:
        try:
            connection = Connection.connect(
                host=to.host,
                port=to.port,
                user=to.user,
                dbname=to.dbname,
                autocommit=True,
                application_name="pgtemp",
                prepare_threshold=None,
                requirepeer=server_user(to.host),
                options=f"{_OPTIONS} {options}",
                **_NOT_FROM_THE_ENVIRONMENT,
            )
            for name in ("text", "name"):
                connection.adapters.register_loader(name, _Text)
            with socket.socket(fileno=os.dup(connection.fileno())) as connected:
                refuse_descriptors(connected)
            return connection
        except errors.ConnectionTimeout as error:
            raise NoAnswerError(f"the server let nobody in within {ANSWER_SECONDS:g} s") from error
        except psycopg.OperationalError as error:
            # One that cannot come back ends, and then the words are others.
            if not _COMES_BACK.search(str(error)) or time.monotonic() > deadline:
                raise
        time.sleep(_RECOVERY_POLL)


def server_user(socket_dir: str) -> str:
    """The user whose server must answer in a directory, for libpq's requirepeer.

    A server's user can put a link in place of its socket. "" if that user is the caller.
    """
    uid = os.stat(f"{socket_dir}/../{DATA}").st_uid
    return identity.name_of(uid) if uid != os.geteuid() else ""


def conninfo(to: ConnectionInfo) -> str:
    """How a program reaches a server by its socket; without a password, for a command line."""
    return make_conninfo(to.conninfo, requirepeer=server_user(to.host))


def has_news(connection: psycopg.Connection[Any]) -> bool:
    """Whether the server has said something unasked, such as that it has ended the session."""
    return connection.closed or bool(select.select([connection], [], [], 0)[0])


@contextmanager
def connected(to: ConnectionInfo) -> Iterator[Connection]:
    """A connection for a block, which turns what goes wrong into a ClusterError."""
    with _told(to), connect(to) as connection:
        yield connection


@contextmanager
def _told(to: ConnectionInfo) -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        words = str(error).strip()
        if isinstance(error, errors.DiskFull) or disk_space.says_full(words):
            place = Path(to.host).resolve()
            raise DiskFullError(
                f"{place} is full ({disk_space.left(place)}): {words.splitlines()[0]}",
                remedy=disk_space.REMEDY,
            ) from error
        if isinstance(error, NoAnswerError):
            raise ClusterError(
                f"PostgreSQL at {to.host}: {words}", remedy="start a new server"
            ) from error
        raise ClusterError(f"PostgreSQL at {to.host} refused: {words}") from error


@dataclass(frozen=True, slots=True)
class Ahead:
    """A connection that was opened before anybody asked, as its user would have opened it."""

    connection: psycopg.Connection[Any]
    environment: frozenset[tuple[str, str]]

    def serves(self) -> bool:
        """Whether it lives, and would be opened in the same way now."""
        return self.environment == _libpq_environment() and not has_news(self.connection)


def open_ahead(uri: str) -> Ahead:
    """Open a connection ahead. Raises psycopg's errors.

    A statement is prepared in it and forgotten, which fills caches that the first would fill.
    """
    environment = _libpq_environment()
    connection = psycopg.connect(uri)
    for statement in (b"SELECT $1::int4, $2::text", b""):
        connection.pgconn.prepare(b"", statement)
    if environment != _libpq_environment():  # nobody knows which of the two libpq has read
        environment = frozenset()
    return Ahead(connection, environment)


def _libpq_environment() -> frozenset[tuple[str, str]]:
    """What libpq reads of the environment, and something that is always there."""
    return frozenset([("", ""), *(pair for pair in os.environ.items() if pair[0].startswith("PG"))])


def was_lost(error: BaseException | None) -> bool:
    """Whether a connection broke; without an SQLSTATE, the error is one of libpq."""
    lost = isinstance(error, psycopg.OperationalError) and error.sqlstate is None
    return lost and not isinstance(error, NoAnswerError)


class AdminConnections:
    """Administrative connections that stay open, one for each thread at work.

    Args:
        check: raises where the server has died, which says more than what a connection hears of it.

    Attributes:
        unanswered: whether the server has left one of them without an answer.
    """

    def __init__(self, to: ConnectionInfo, check: Callable[[], None]) -> None:
        self._to = to
        self._check = check
        self._idle: deque[Connection] = deque()
        self._owner = os.getpid()
        self.unanswered = False
        self.closing = threading.Event()

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """One of them; a broken one is not used again. Errors as with `connected`."""
        if self._owner != os.getpid():
            raise ClusterError(
                "the cluster belongs to the process that this one was forked from",
                remedy="make one in this process",
            )
        with self._told_of_a_crash(), _told(self._to):
            connection = self._get()
            try:
                yield connection
            finally:
                if connection.broken or self.closing.is_set():
                    connection.close()
                else:
                    self._idle.append(connection)

    @contextmanager
    def _told_of_a_crash(self) -> Iterator[None]:
        try:
            yield
        except ClusterError as error:
            of = error.__cause__
            self.unanswered |= isinstance(of, NoAnswerError | errors.LockNotAvailable)
            for _ in range(_MOMENTS if was_lost(of) else 0):
                try:
                    self._check()
                except PgTempError as death:
                    raise death from error
                self.closing.wait(_MOMENT)
            raise

    def _get(self) -> Connection:
        """An idle connection that lives; tests like to terminate all others they find."""
        while self._idle:
            connection = self._idle.pop()
            if not has_news(connection):
                return connection
            connection.close()
        return connect(self._to, options=_CATALOGS_ONLY)

    def elsewhere(self, dbname: str) -> ConnectionInfo:
        """The same way to another database."""
        to = self._to
        return ConnectionInfo(host=to.host, port=to.port, user=to.user, dbname=dbname)

    def close(self) -> None:
        self.closing.set()
        while self._idle:
            self._idle.pop().close()
