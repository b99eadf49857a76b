"""The few SQL statements pgtemp needs, over psycopg, on the server's private socket."""

from __future__ import annotations

import threading
import time
from typing import LiteralString

from psycopg import errors, sql

from pgtemp.host import disk_space
from pgtemp.sql import admin_connections
from pgtemp.sql.admin_connections import Connection
from pgtemp.sql.answer_limits import seconds_to_copy
from pgtemp.sql.passwords import Secret
from pgtemp.uri import ConnectionInfo

MAINTENANCE = "postgres"  # the database that administrative connections go to
BASE = "template1"  # the empty database that others begin with
ALWAYS_THERE = (MAINTENANCE, "template0", BASE)  # in every server, whoever made it
# How long a source may be in use by somebody else before a clone of it fails.
IN_USE_SECONDS = 10.0
_IN_USE_POLL = 0.02
_EMPTY_BYTES, _EMPTY_FILES = 8 << 20, 300  # of an empty database
_NEVER = threading.Event()


def ensure_role(connection: Connection, user: str, secret: Secret | None) -> None:
    """Make `user` a superuser that can log in, with this password; it may exist already."""
    clauses = sql.SQL("{} SUPERUSER LOGIN").format(sql.Identifier(user))
    clauses += _password(connection, user, secret)
    try:
        connection.execute(sql.SQL("ALTER ROLE {}").format(clauses))
    except errors.UndefinedObject:
        connection.execute(sql.SQL("CREATE ROLE {}").format(clauses))


def ensure_login(connection: Connection, user: str, attributes: str, secret: Secret | None) -> bool:
    """Make a role for a client that connects, unless it exists; whether it was made.

    Args:
        attributes: of the role, as options.py has checked them.
        secret: the password of a role that has none.
    """
    found = connection.execute(
        "SELECT rolpassword IS NULL FROM pg_authid WHERE rolname = %s", [user]
    ).fetchone()
    if found == (False,) or (found and secret is None):
        return False
    words = sql.SQL("{}").format(sql.Identifier(user)) + _password(connection, user, secret)
    if found:
        connection.execute(sql.SQL("ALTER ROLE {}").format(words))
        return False
    words += sql.SQL(" LOGIN") + sql.SQL("").join(
        sql.SQL(f" {word}") for word in attributes.split()
    )
    try:
        connection.execute(sql.SQL("CREATE ROLE {}").format(words))
    except (errors.DuplicateObject, errors.UniqueViolation):
        return False  # another thread or client was faster
    return True


def _password(connection: Connection, user: str, secret: Secret | None) -> sql.Composed:
    """The clause that gives a role its password; a verifier, since statements may be logged."""
    if secret is None:
        return sql.Composed([])
    verifier = (
        secret.verifier
        or connection.pgconn.encrypt_password(
            secret.password.encode(), user.encode(), b"scram-sha-256"
        ).decode()
    )
    return sql.SQL(" PASSWORD {}").format(sql.Literal(verifier))


def set_owner(connection: Connection, dbname: str, owner: str) -> None:
    """Give a database to a role."""
    connection.execute(_about("ALTER DATABASE {} OWNER TO {}", dbname, owner))


def empty(connection: Connection, dbname: str) -> None:
    """End everybody who is connected to a database, and wait until they are gone."""
    connection.ask(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1", dbname
    )


def ensure_database(connection: Connection, dbname: str, owner: str) -> None:
    """Make a database unless it exists."""
    if not exists(connection, dbname):
        clone(connection, dbname, BASE, owner)


def exists(connection: Connection, dbname: str) -> bool:
    """Whether there is a database of that name."""
    found = connection.ask("SELECT 1 FROM pg_database WHERE datname = $1", dbname)
    return found.fetchone() is not None


def databases(connection: Connection) -> list[str]:
    """The names of those that one can connect to, but for the maintenance databases."""
    rows = connection.execute(
        "SELECT datname FROM pg_database WHERE datallowconn AND datname <> ALL(%s) ORDER BY 1",
        [list(ALWAYS_THERE)],
    )
    return [str(name) for (name,) in rows.fetchall()]


def take_over(connection: Connection, dbname: str, name: str, owner: str) -> None:
    """Make a sealed database a usual one, with another name and owner; nobody else wants it."""
    unseal(connection, dbname)
    if name != dbname:
        rename(connection, dbname, name)
    set_owner(connection, name, owner)


def drop_empty(connection: Connection, dbname: str) -> None:
    """Drop a database in which nobody has worked yet."""
    connection.execute(_about("DROP DATABASE {}", dbname))


def clone(
    connection: Connection,
    dbname: str,
    source: str,
    owner: str,
    give_up: threading.Event | None = None,
    *,
    attributes: bool = True,
    size: int | None = None,
) -> None:
    """Make a database as a copy of another; waits while that one is in use.

    Args:
        attributes: copy settings and privileges of the database itself, too.
        give_up: set when waiting any longer is pointless.
        size: of the source in bytes; None asks for it.

    Raises:
        errors.ObjectInUse: it stayed in use; names nobody, see `users_of`.
        DiskFullError: there is too little room.
    """
    # Before PostgreSQL tries: it begins with a checkpoint, and on a full disk that ends the server.
    if size is None:
        size = _EMPTY_BYTES if source == BASE else size_of(connection, source)
    disk_space.check_with_spare(connection.home, "another database", size=size, files=_EMPTY_FILES)
    # The files are copied rather than logged, which takes half the time from a small template and
    # a third from one of fifty tables.
    statement = _about(
        "CREATE DATABASE {} TEMPLATE {} OWNER {} STRATEGY file_copy", dbname, source, owner
    )
    deadline = time.monotonic() + IN_USE_SECONDS
    while True:
        try:
            with connection.given(seconds_to_copy(size)):
                connection.execute(statement)
            break
        except errors.ObjectInUse:
            # Nothing tells when somebody leaves a database; the server itself waits five seconds.
            if time.monotonic() > deadline or (give_up or _NEVER).wait(_IN_USE_POLL):
                raise

    if attributes and source != BASE:  # whose privileges are for those who make databases of it
        copy_attributes(connection, source, dbname)


def has_attributes(connection: Connection, dbname: str) -> bool:
    """Whether a database has settings or privileges of its own, which CREATE DATABASE leaves."""
    found = connection.execute(
        "SELECT 1 FROM pg_database d WHERE datname = %s AND (datacl IS NOT NULL OR EXISTS"
        " (SELECT 1 FROM pg_db_role_setting WHERE setdatabase = d.oid))",
        [dbname],
    )
    return found.fetchone() is not None


def size_of(connection: Connection, dbname: str) -> int:
    """The bytes of a database's files."""
    row = connection.execute("SELECT pg_database_size(%s::name)", [dbname]).fetchone()
    return int(row[0]) if row is not None else 0


def copy_attributes(connection: Connection, source: str, dbname: str) -> None:
    """Copy the settings and privileges of a database itself, which CREATE DATABASE leaves out."""
    # Row by row in the catalogs: as statements they would have to be put together from texts that
    # PostgreSQL has no function to quote (pg_dump does it in C).
    names = {"source": source, "dbname": dbname}
    connection.execute(
        "INSERT INTO pg_db_role_setting SELECT d.oid, setrole, setconfig"
        " FROM pg_db_role_setting JOIN pg_database s ON s.oid = setdatabase, pg_database d"
        " WHERE s.datname = %(source)s AND d.datname = %(dbname)s",
        names,
    )
    connection.execute(
        "UPDATE pg_database d SET datacl = s.datacl FROM pg_database s"
        " WHERE s.datname = %(source)s AND d.datname = %(dbname)s AND s.datacl IS NOT NULL",
        names,
    )


def users_of(connection: Connection, dbname: str) -> list[str]:
    """Who is connected to a database, as "application, query"."""
    rows = connection.execute(
        "SELECT coalesce(nullif(application_name, ''), 'pid ' || pid), left(query, 80)"
        " FROM pg_stat_activity WHERE datname = %s",
        [dbname],
    ).fetchall()
    return [f"{who}: {query}" if query else who for who, query in rows]


def seal(connection: Connection, dbname: str, name: str, there: ConnectionInfo) -> None:
    """Make a database a template that nobody can change any more; its final name comes last.

    Args:
        there: the way to the database itself.
    """
    _clear(connection, dbname, there)  # a prepared transaction would stay in it for good
    close_door(connection, dbname)
    empty(connection, dbname)
    connection.execute(_about("ALTER DATABASE {} IS_TEMPLATE true", dbname))
    rename(connection, dbname, name)


def close_door(connection: Connection, dbname: str) -> None:
    """Let nobody connect to a database any more."""
    connection.execute(_about("ALTER DATABASE {} ALLOW_CONNECTIONS false", dbname))


def drop(connection: Connection, dbname: str, there: ConnectionInfo) -> None:
    """Drop a database, whoever is connected and whatever they left in it.

    Args:
        there: the way to the database itself, for what can only be undone from inside.
    """
    statement = _about("DROP DATABASE IF EXISTS {} WITH (FORCE)", dbname)
    # It begins with a checkpoint, which on a full disk ends the server.
    with disk_space.spared(connection.home):
        try:
            connection.execute(statement)
        except errors.ObjectInUse:
            _clear(connection, dbname, there)
            connection.execute(statement)


def clings(connection: Connection, dbname: str) -> bool:
    """Whether something of a database, seen in all others, keeps it; see `drop`."""
    found = connection.ask(
        "SELECT 1 FROM pg_replication_slots WHERE database = $1"
        " UNION ALL SELECT 1 FROM pg_prepared_xacts WHERE database = $1"
        " UNION ALL SELECT 1 FROM pg_subscription"
        " WHERE subdbid = (SELECT oid FROM pg_database WHERE datname = $1)",
        dbname,
    )
    return found.fetchone() is not None


def unseal(connection: Connection, dbname: str) -> None:
    """Undo what `seal` may have begun."""
    connection.execute(_about("ALTER DATABASE {} IS_TEMPLATE false", dbname))
    connection.execute(_about("ALTER DATABASE {} ALLOW_CONNECTIONS true", dbname))


def rename(connection: Connection, dbname: str, name: str) -> None:
    """Give a database that nobody is connected to another name."""
    connection.execute(_about("ALTER DATABASE {} RENAME TO {}", dbname, name))


def _clear(connection: Connection, dbname: str, there: ConnectionInfo) -> None:
    """Undo what keeps a database: slots, prepared transactions, subscriptions."""
    for slot, pid in connection.execute(
        "SELECT slot_name, active_pid FROM pg_replication_slots WHERE database = %s", [dbname]
    ).fetchall():
        if pid is not None:
            connection.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        connection.execute("SELECT pg_drop_replication_slot(%s)", [slot])
    with admin_connections.connect(there) as inside:
        for (gid,) in inside.execute(
            "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
        ).fetchall():
            inside.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
        for (name,) in inside.execute(
            "SELECT subname FROM pg_subscription WHERE subdbid ="
            " (SELECT oid FROM pg_database WHERE datname = current_database())"
        ).fetchall():
            inside.execute(_about("ALTER SUBSCRIPTION {} DISABLE", name))
            inside.execute(_about("ALTER SUBSCRIPTION {} SET (slot_name = NONE)", name))
            inside.execute(_about("DROP SUBSCRIPTION {}", name))


def _about(statement: LiteralString, *names: str) -> sql.Composed:
    return sql.SQL(statement).format(*(sql.Identifier(name) for name in names))
