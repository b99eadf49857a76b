"""The leak check: what a lease leaves in a shared server outside its database.

Roles, settings and databases that a client created are cluster-wide: a database does not isolate
them, and dropping it does not remove them. The leak check compares the shared catalogs with their
earlier state.

Every server also has the databases `template0`, `template1` and `postgres`. The first two accept no
connections, and the leak check detects if a client changes that. `postgres` must accept pgtemp's
own connections, so the leak check searches its catalogs for new objects whenever the server's
counters show another session or a changed row. Names are compared as bytes, independently of their
encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg import sql

from pgtemp.host.tree import Tree
from pgtemp.sql import admin_sql
from pgtemp.sql.connection import Connection

# The kind of an object, its name, the database that it is dropped with, and a hash of its other
# properties, because a comment may have hundreds of megabytes.
_SHARED = """
SELECT kind, name, dbname,
  CASE kind WHEN 'counters' THEN rest ELSE encode(sha256(textsend(rest)), 'hex') END
FROM (
SELECT 'role' AS kind, rolname::text AS name, NULL AS dbname, a::text AS rest FROM pg_authid a
UNION ALL
SELECT 'membership', concat_ws(' ', roleid::regrole, 'of', member::regrole, 'by',
  grantor::regrole), NULL, m::text FROM pg_auth_members m
UNION ALL
SELECT 'comment', concat_ws(' ', classoid::regclass, objoid), datname::text, description
  FROM pg_shdescription LEFT JOIN pg_database d
  ON classoid = 'pg_database'::regclass AND d.oid = objoid
UNION ALL
SELECT 'security label', concat_ws(' ', provider, classoid::regclass, objoid), datname::text, label
  FROM pg_shseclabel LEFT JOIN pg_database d
  ON classoid = 'pg_database'::regclass AND d.oid = objoid
UNION ALL
SELECT 'setting', concat_ws(' ', nullif(setrole, 0)::regrole, datname), datname::text,
  setconfig::text FROM pg_db_role_setting LEFT JOIN pg_database d ON d.oid = setdatabase
UNION ALL
SELECT 'tablespace', spcname::text, NULL, t::text FROM pg_tablespace t
UNION ALL
SELECT 'privilege on setting', parname, NULL, paracl::text FROM pg_parameter_acl
UNION ALL
SELECT 'replication origin', roname, NULL, roident::text FROM pg_replication_origin
UNION ALL
SELECT 'replication slot', slot_name::text, database::text, '' FROM pg_replication_slots
UNION ALL
SELECT 'prepared transaction', gid, database::text, '' FROM pg_prepared_xacts
UNION ALL
SELECT 'subscription', subname::text, datname::text, ''
  FROM pg_subscription LEFT JOIN pg_database d ON d.oid = subdbid
UNION ALL
SELECT 'dependency', concat_ws(' ', classid::regclass, objid, objsubid, refclassid::regclass,
  refobjid, deptype), datname::text, '' FROM pg_shdepend s
  LEFT JOIN pg_database d ON classid = 'pg_database'::regclass AND d.oid = objid WHERE dbid = 0
UNION ALL
SELECT 'database', datname::text, datname::text, d.xmin::text FROM pg_database d
UNION ALL
SELECT 'counters', current_database()::text, NULL, concat_ws(' ', sessions, tup_inserted,
  tup_updated, tup_deleted, stats_reset, (SELECT max(oid) FROM pg_class),
  (SELECT max(oid) FROM pg_type), (SELECT max(oid) FROM pg_proc),
  (SELECT max(oid) FROM pg_namespace), (SELECT max(oid) FROM pg_largeobject_metadata))
  FROM pg_stat_database WHERE datname = current_database()
) AS shared LIMIT 10001
"""
_MOST = 10_000  # objects of a server; a lease that left more left too many to list
# Properties of a database that a change of its row in pg_database does not show.
_OF_DATABASES = ("comment", "security label", "setting")
# The row version (xmin) of a database also changes if a client allows connections to it, changes it
# and forbids connections again. VACUUM updates the row in place and does not change its xmin. The
# xmin of an object changes with the object. Excluded are the statistics that ANALYZE writes, and
# the contents of large objects, whose metadata rows are included.
_OBJECTS = """
SELECT format('SELECT EXISTS (%s)', string_agg(format(
  'SELECT FROM %s WHERE age(xmin) <= age(%L::xid)', oid::regclass, $1::text), ' UNION ALL '))
FROM pg_class
WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind = 'r' AND NOT relisshared
  AND relname NOT IN ('pg_statistic', 'pg_statistic_ext_data', 'pg_largeobject')
"""
_VERSION = """
SELECT encode(sha256(textsend(xmin::text)), 'hex') FROM pg_database WHERE datname = $1
"""
_ROLE, _SYSTEM, _COUNTERS = "role", "ALTER SYSTEM", "counters"
# A superuser can write these files, if necessary with a program; the server reads them at the next
# reload.
_FILES = (
    ("postgresql.auto.conf", _SYSTEM),
    *((name, name) for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf")),
)
State = dict[tuple[str, str], str]


@dataclass(slots=True)
class LeakCheck:
    """Compares the state of a server with an earlier, accepted state.

    Attributes:
        data_dir: the data directory of the server.
        ours: a function that returns whether pgtemp itself creates and drops a database of this
            name.
        template: the database that others are cloned from.
    """

    data_dir: Path
    ours: Callable[[str], bool]
    template: str
    _before: State = field(default_factory=dict)
    _setting_changes: int = 0  # the counter of changes of pg_db_role_setting
    # The databases that no lease had yet, with the version of their rows in pg_database.
    _ready: dict[str, str] = field(default_factory=dict)
    _began: str = ""  # the first transaction id after `accept`
    _counters: str = ""  # the counters of the maintenance database
    _objects: str = ""  # whether objects in the maintenance database were changed

    def accept(self, connection: Connection) -> None:
        """Accept the current state as the state without leaks."""
        found = connection.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::xid::text")
        ((self._began,),) = found.fetchall()
        self._before = self._now(connection)
        self.settings_were_touched(connection)

    def add_ready(self, connection: Connection, dbname: str) -> bool:
        """Accept the current state of a database that no lease had yet; False if it is missing."""
        row = connection.ask(_VERSION, dbname).fetchone()
        if row is not None:
            self._ready[dbname] = row[0]
        return row is not None

    def remove_ready(self, dbname: str) -> None:
        """Ignore changes of a database from now on."""
        self._ready.pop(dbname, None)

    def is_ready(self, dbname: str) -> bool:
        """Whether changes of the database are found."""
        return dbname in self._ready

    def settings_were_touched(self, connection: Connection) -> bool:
        """Return whether settings of roles or databases were changed since the last call.

        If they were changed and changed back, a session may have been opened with them in between.
        """
        row = connection.ask(
            "SELECT pg_stat_get_tuples_inserted(c) + pg_stat_get_tuples_updated(c)"
            " FROM (SELECT 'pg_db_role_setting'::regclass AS c) AS of"
        ).fetchone()
        before = self._setting_changes
        self._setting_changes = row[0] if row is not None else 0
        return self._setting_changes != before

    def accept_role(self, connection: Connection, name: str) -> None:
        """Accept a role that pgtemp itself has created."""
        row = connection.execute(
            "SELECT encode(sha256(textsend(a::text)), 'hex') FROM pg_authid a WHERE rolname = %s",
            [name],
        ).fetchone()
        if row is not None:
            self._before[_ROLE, name] = row[0]

    def knows_role(self, name: str) -> bool:
        """Whether a role of that name is expected to exist."""
        return (_ROLE, name) in self._before

    def found(self, connection: Connection) -> list[tuple[str, str]]:
        """Return the kind and name of everything that was added, changed or removed."""
        found = self._different(connection)
        if found:
            # Compare again: if pgtemp dropped one of its databases after the first query, `ours`
            # no longer recognizes the name, and the first result contains it.
            found &= self._different(connection)
        return sorted(found)

    def _different(self, connection: Connection) -> set[tuple[str, str]]:
        before, now = self._before, self._now(connection)
        return {key for key in now.keys() | before.keys() if now.get(key) != before.get(key)}

    def clean(
        self, connection: Connection, found: Iterable[tuple[str, str]]
    ) -> list[tuple[str, str]]:
        """Drop the roles that were added, and return the differences that remain."""
        added = [name for kind, name in found if kind == _ROLE and (kind, name) not in self._before]
        try:
            for name in added:
                connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))
        except (psycopg.Error, UnicodeError):
            pass  # the role owns another leaked object, or its name cannot be encoded
        return self.found(connection)

    def _now(self, connection: Connection) -> State:
        ready = dict(self._ready)
        rows = connection.ask(_SHARED).fetchall()
        if len(rows) > _MOST:
            return {("objects", f"more than {_MOST}"): ""}
        state = {
            (kind, name): row
            for kind, name, database, row in rows
            if database is None or not self.ours(database)
        }
        counters = state.pop((_COUNTERS, admin_sql.MAINTENANCE), "")
        if counters != self._counters:
            self._counters, self._objects = counters, self._changed(connection, counters)
        state |= self._changes_of(ready, rows)
        state["objects in database", admin_sql.MAINTENANCE] = self._objects
        return state | {(kind, ""): self._stamp(name) for name, kind in _FILES}

    def _changes_of(self, ready: Mapping[str, str], rows: Iterable[Sequence[str]]) -> State:
        """Return an entry for each ready database that was changed or dropped."""
        properties: dict[str, set[tuple[str, str, str]]] = {}
        versions: dict[str, str] = {}
        for kind, name, dbname, row in rows:
            if kind in _OF_DATABASES and dbname is not None:
                of = name.removesuffix(dbname) if kind == "setting" else kind
                properties.setdefault(dbname, set()).add((kind, of, row))
            elif kind == "database":
                versions[dbname] = row
        expected = {one for one in properties.get(self.template, set()) if one[0] == "setting"}
        return {
            ("database", dbname): "changed"
            for dbname, version in ready.items()
            # One that is given to a lease, or dropped, meanwhile is no longer in `_ready`.
            if dbname in self._ready
            and (versions.get(dbname) != version or properties.get(dbname, set()) != expected)
        }

    def _changed(self, connection: Connection, counters: str) -> str:
        """Return a string that changes if an object in the maintenance database changes.

        It also changes if a row is deleted in that database.
        """
        ((statement,),) = connection.ask(_OBJECTS, self._began).fetchall()
        row = connection.execute(statement.encode()).fetchone()
        # The number of deleted rows, the time of the last reset of the counters, and the newest
        # objects. The latter are needed because a walsender is not counted as a session, and it can
        # disable the counting of its rows (track_counts).
        return f"{row} {counters.split()[3:]}"

    def _stamp(self, name: str) -> str:
        """Return a string that changes if a file is written; no program can set its change time."""
        try:
            with Tree.open(self.data_dir) as data:
                status = data.status(name)
        except OSError:
            return ""
        if status is None:
            return ""
        return f"{status.st_ctime_ns} {status.st_size} {status.st_ino}"
