"""The SQL statements that pgtemp executes, over psycopg, on the server's private socket."""

from __future__ import annotations

import threading
import time
from typing import LiteralString

from psycopg import errors, sql

from pgtemp.host import disk_space
from pgtemp.sql.connection import Connection, connect
from pgtemp.sql.passwords import Secret
from pgtemp.sql.timeouts import seconds_to_copy
from pgtemp.uri import ConnectionInfo

MAINTENANCE = "postgres"  # the database of administrative connections
BASE = "template1"  # the empty database that others are cloned from
# In every server, even on a copied data directory.
ALWAYS_THERE = (MAINTENANCE, "template0", BASE)
# How long other sessions may use the source database before a clone of it fails.
IN_USE_SECONDS = 10.0
_IN_USE_POLL = 0.02
_EMPTY_BYTES, _EMPTY_FILES = 8 << 20, 300  # the size of an empty database
_NEVER = threading.Event()


def ensure_role(connection: Connection, user: str, secret: Secret | None) -> None:
    """Create or alter the role `user`: a superuser that can log in with this password."""
    clauses = sql.SQL("{} SUPERUSER LOGIN").format(sql.Identifier(user))
    clauses += _password(connection, user, secret)
    try:
        connection.execute(sql.SQL("ALTER ROLE {}").format(clauses))
    except errors.UndefinedObject:
        connection.execute(sql.SQL("CREATE ROLE {}").format(clauses))


def ensure_login(connection: Connection, user: str, attributes: str, secret: Secret | None) -> bool:
    """Create a role for a client that connects, and return whether it was created.

    An existing role is not changed.

    Args:
        attributes: the attributes of the role, already checked by options/daemon.py.
        secret: the password; also given to an existing role that has none.
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
        return False  # another session created the role in the meantime
    return True


def _password(connection: Connection, user: str, secret: Secret | None) -> sql.Composed:
    """Return the PASSWORD clause; it contains a verifier, because statements may be logged."""
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
    """Change the owner of a database."""
    connection.execute(_with_names("ALTER DATABASE {} OWNER TO {}", dbname, owner))


def disconnect_all(connection: Connection, dbname: str) -> None:
    """Terminate all sessions of a database and wait until their backends have exited."""
    connection.ask(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1", dbname
    )


def ensure_database(connection: Connection, dbname: str, owner: str) -> None:
    """Create a database unless it exists."""
    if not exists(connection, dbname):
        clone(connection, dbname, BASE, owner)


def exists(connection: Connection, dbname: str) -> bool:
    """Return whether a database of that name exists."""
    found = connection.ask("SELECT 1 FROM pg_database WHERE datname = $1", dbname)
    return found.fetchone() is not None


def databases(connection: Connection) -> list[str]:
    """Return the names of all databases that allow connections, except those in ALWAYS_THERE."""
    rows = connection.execute(
        "SELECT datname FROM pg_database WHERE datallowconn AND datname <> ALL(%s) ORDER BY 1",
        [list(ALWAYS_THERE)],
    )
    return [str(name) for (name,) in rows.fetchall()]


def take_over(connection: Connection, dbname: str, name: str, owner: str) -> None:
    """Make a sealed database an ordinary one, with another name and owner.

    No other session may use the database in the meantime.
    """
    unseal(connection, dbname)
    if name != dbname:
        rename(connection, dbname, name)
    set_owner(connection, name, owner)


def drop_empty(connection: Connection, dbname: str) -> None:
    """Drop a database that no session has used yet."""
    connection.execute(_with_names("DROP DATABASE {}", dbname))


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
    """Create a database as a copy of another; wait while other sessions use the source.

    Args:
        attributes: also copy the settings and the privileges of the database itself.
        give_up: an event that, when set, stops the wait.
        size: the size of the source in bytes; None queries it.

    Raises:
        errors.ObjectInUse: other sessions still use the source. The error does not list them; see
            `sessions_in`.
        DiskFullError: there is too little disk space.
    """
    # Check before PostgreSQL tries: CREATE DATABASE begins with a checkpoint, and a checkpoint on a
    # full disk makes the server shut down.
    if size is None:
        size = _EMPTY_BYTES if source == BASE else size_of(connection, source)
    disk_space.check_with_spare(connection.home, "another database", size=size, files=_EMPTY_FILES)
    # file_copy copies the files instead of writing them to the WAL. This takes half the time for a
    # small template and a third of the time for one of fifty tables.
    statement = _with_names(
        "CREATE DATABASE {} TEMPLATE {} OWNER {} STRATEGY file_copy", dbname, source, owner
    )
    deadline = time.monotonic() + IN_USE_SECONDS
    while True:
        try:
            with connection.given(seconds_to_copy(size)):
                connection.execute(statement)
            break
        except errors.ObjectInUse:
            # PostgreSQL sends no notification when a session ends, so poll. CREATE DATABASE itself
            # has already waited five seconds.
            if time.monotonic() > deadline or (give_up or _NEVER).wait(_IN_USE_POLL):
                raise

    if attributes and source != BASE:  # the privileges of template1 are not meant for clones
        copy_attributes(connection, source, dbname)


def has_attributes(connection: Connection, dbname: str) -> bool:
    """Return whether a database has settings or privileges that CREATE DATABASE does not copy."""
    found = connection.execute(
        "SELECT 1 FROM pg_database d WHERE datname = %s AND (datacl IS NOT NULL OR EXISTS"
        " (SELECT 1 FROM pg_db_role_setting WHERE setdatabase = d.oid))",
        [dbname],
    )
    return found.fetchone() is not None


def size_of(connection: Connection, dbname: str) -> int:
    """Return the size of a database's files in bytes; 0 if it does not exist."""
    row = connection.execute("SELECT pg_database_size(%s::name)", [dbname]).fetchone()
    return int(row[0]) if row is not None else 0


def copy_attributes(connection: Connection, source: str, dbname: str) -> None:
    """Copy the settings and privileges of a database itself, which CREATE DATABASE omits."""
    # Copy the catalog rows. ALTER DATABASE and GRANT statements would have to be built from strings
    # that no function of PostgreSQL can quote (pg_dump does it in C).
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


def sessions_in(connection: Connection, dbname: str) -> list[str]:
    """Return the sessions of a database, each as "application: query"."""
    rows = connection.execute(
        "SELECT coalesce(nullif(application_name, ''), 'pid ' || pid), left(query, 80)"
        " FROM pg_stat_activity WHERE datname = %s",
        [dbname],
    ).fetchall()
    return [f"{client}: {query}" if query else client for client, query in rows]


def seal(connection: Connection, dbname: str, name: str, there: ConnectionInfo) -> None:
    """Make a database a template that no session can change; it is renamed last.

    Args:
        there: the connection parameters of the database itself.
    """
    _clear(connection, dbname, there)  # a prepared transaction would stay in it permanently
    forbid_connections(connection, dbname)
    disconnect_all(connection, dbname)
    connection.execute(_with_names("ALTER DATABASE {} IS_TEMPLATE true", dbname))
    rename(connection, dbname, name)


def forbid_connections(connection: Connection, dbname: str) -> None:
    """Make a database refuse new connections."""
    connection.execute(_with_names("ALTER DATABASE {} ALLOW_CONNECTIONS false", dbname))


def drop(connection: Connection, dbname: str, there: ConnectionInfo) -> None:
    """Drop a database, even if it has sessions, slots, prepared transactions or subscriptions.

    Args:
        there: the connection parameters of the database itself; prepared transactions and
            subscriptions can only be removed from inside it.
    """
    statement = _with_names("DROP DATABASE IF EXISTS {} WITH (FORCE)", dbname)
    # DROP DATABASE begins with a checkpoint; on a full disk that makes the server shut down.
    with disk_space.reserve_released(connection.home):
        try:
            connection.execute(statement)
        except errors.ObjectInUse:
            _clear(connection, dbname, there)
            connection.execute(statement)


def has_drop_obstacles(connection: Connection, dbname: str) -> bool:
    """Return whether slots, prepared transactions or subscriptions prevent DROP DATABASE.

    The catalogs show them in every database. `drop` removes them.
    """
    found = connection.ask(
        "SELECT 1 FROM pg_replication_slots WHERE database = $1"
        " UNION ALL SELECT 1 FROM pg_prepared_xacts WHERE database = $1"
        " UNION ALL SELECT 1 FROM pg_subscription"
        " WHERE subdbid = (SELECT oid FROM pg_database WHERE datname = $1)",
        dbname,
    )
    return found.fetchone() is not None


def unseal(connection: Connection, dbname: str) -> None:
    """Undo `seal`, even if it did not finish; the name is not changed."""
    connection.execute(_with_names("ALTER DATABASE {} IS_TEMPLATE false", dbname))
    connection.execute(_with_names("ALTER DATABASE {} ALLOW_CONNECTIONS true", dbname))


def rename(connection: Connection, dbname: str, name: str) -> None:
    """Rename a database that has no sessions."""
    connection.execute(_with_names("ALTER DATABASE {} RENAME TO {}", dbname, name))


def _clear(connection: Connection, dbname: str, there: ConnectionInfo) -> None:
    """Remove what prevents DROP DATABASE: slots, prepared transactions, subscriptions."""
    for slot, pid in connection.execute(
        "SELECT slot_name, active_pid FROM pg_replication_slots WHERE database = %s", [dbname]
    ).fetchall():
        if pid is not None:
            connection.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
        connection.execute("SELECT pg_drop_replication_slot(%s)", [slot])
    with connect(there) as inside:
        for (gid,) in inside.execute(
            "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()"
        ).fetchall():
            inside.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(gid)))
        for (name,) in inside.execute(
            "SELECT subname FROM pg_subscription WHERE subdbid ="
            " (SELECT oid FROM pg_database WHERE datname = current_database())"
        ).fetchall():
            inside.execute(_with_names("ALTER SUBSCRIPTION {} DISABLE", name))
            inside.execute(_with_names("ALTER SUBSCRIPTION {} SET (slot_name = NONE)", name))
            inside.execute(_with_names("DROP SUBSCRIPTION {}", name))


def _with_names(statement: LiteralString, *names: str) -> sql.Composed:
    """Insert the quoted names into a statement."""
    return sql.SQL(statement).format(*(sql.Identifier(name) for name in names))
