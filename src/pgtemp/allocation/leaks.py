"""What a tenant leaves in a server beside its database: roles, settings, databases made by hand.

All of these are cluster-wide, so that a database does not isolate them and dropping it does not
take them away. They are found by comparing the shared catalogs with what they were.

Every server also has the databases `template0`, `template1` and `postgres`. The first two accept no
connections, and a change of that is found. `postgres` has to accept pgtemp's own, so objects in it
are looked for: in its catalogs, whenever the server's counters say that another session was there
or that a row was changed. Names are compared as bytes, whatever their encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg import sql

from pgtemp.host.tree import Tree
from pgtemp.sql import admin_sql
from pgtemp.sql.admin_connections import Connection

# What it is, its name, the database that it goes with, and the rest of it.
# The rest is compared by its hash: a text that a client stored may have hundreds of megabytes.
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
SELECT 'database', datname::text, datname::text, d.xmin::text FROM pg_database d
UNION ALL
SELECT 'counters', current_database()::text, NULL, concat_ws(' ', sessions, tup_inserted,
  tup_updated, tup_deleted, stats_reset, (SELECT max(oid) FROM pg_class),
  (SELECT max(oid) FROM pg_type), (SELECT max(oid) FROM pg_proc),
  (SELECT max(oid) FROM pg_namespace), (SELECT max(oid) FROM pg_largeobject_metadata))
  FROM pg_stat_database WHERE datname = current_database()
) AS shared
"""
# The row version (xmin) of a database also changes when it is opened, changed and closed again.
# VACUUM updates the row in place, which keeps it. That of an object changes with the object; but
# ANALYZE writes statistics, and contents of large objects belong to rows that are looked at.
_OBJECTS = """
SELECT format('SELECT EXISTS (%s)', string_agg(format(
  'SELECT FROM %s WHERE age(xmin) <= age(%L::xid)', oid::regclass, $1::text), ' UNION ALL '))
FROM pg_class
WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind = 'r' AND NOT relisshared
  AND relname NOT IN ('pg_statistic', 'pg_statistic_ext_data', 'pg_largeobject')
"""
_ROLE, _SYSTEM, _COUNTERS = "role", "ALTER SYSTEM", "counters"
# What a superuser may have written there, by a program if need be, is read at the next reload.
_FILES = (
    ("postgresql.auto.conf", _SYSTEM),
    *((name, name) for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf")),
)
State = dict[tuple[str, str], str]


@dataclass(slots=True)
class LeakCheck:
    """What there was in a server, and what has come to it since.

    Attributes:
        ours: whether a database of this name is one of pgtemp's own, which come and go.
    """

    data_dir: Path
    ours: Callable[[str], bool]
    _before: State = field(default_factory=dict)
    _touched: int = 0
    _began: str = ""  # the first transaction id after `accept`
    _counters: str = ""  # of the maintenance database
    _objects: str = ""  # whether objects in it were changed

    def accept(self, connection: Connection) -> None:
        """Take what there is now for what there should be."""
        found = connection.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::xid::text")
        ((self._began,),) = found.fetchall()
        self._before = self._now(connection)
        self.settings_were_touched(connection)

    def settings_were_touched(self, connection: Connection) -> bool:
        """Whether settings of roles or databases were changed since the last look.

        Somebody may have connected under them though they are what they were again.
        """
        row = connection.ask(
            "SELECT pg_stat_get_tuples_inserted(c) + pg_stat_get_tuples_updated(c)"
            " FROM (SELECT 'pg_db_role_setting'::regclass AS c) AS of"
        ).fetchone()
        before, self._touched = self._touched, row[0] if row is not None else 0
        return self._touched != before

    def accept_role(self, connection: Connection, name: str) -> None:
        """A role that pgtemp itself has made."""
        row = connection.execute(
            "SELECT encode(sha256(textsend(a::text)), 'hex') FROM pg_authid a WHERE rolname = %s",
            [name],
        ).fetchone()
        if row is not None:
            self._before[_ROLE, name] = row[0]

    def knows_role(self, name: str) -> bool:
        """Whether there should be a role of that name."""
        return (_ROLE, name) in self._before

    def found(self, connection: Connection) -> list[tuple[str, str]]:
        """What was left, changed or taken away: what it is, and its name."""
        found = self._different(connection)
        if found:
            # A database of ours that was dropped since the question is not known to be ours.
            found &= self._different(connection)
        return sorted(found)

    def _different(self, connection: Connection) -> set[tuple[str, str]]:
        before, now = self._before, self._now(connection)
        return {key for key in now.keys() | before.keys() if now.get(key) != before.get(key)}

    def clean(
        self, connection: Connection, found: Iterable[tuple[str, str]]
    ) -> list[tuple[str, str]]:
        """Drop roles that were left; what remains after that."""
        added = [name for kind, name in found if kind == _ROLE and (kind, name) not in self._before]
        try:
            for name in added:
                connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))
        except (psycopg.Error, UnicodeError):
            pass  # it owns something that is left as well, or its name cannot be sent
        return self.found(connection)

    def _now(self, connection: Connection) -> State:
        rows = connection.ask(_SHARED).fetchall()
        state = {
            (kind, name): row
            for kind, name, database, row in rows
            if database is None or not self.ours(database)
        }
        counters = state.pop((_COUNTERS, admin_sql.MAINTENANCE), "")
        if counters != self._counters:
            self._counters, self._objects = counters, self._changed(connection, counters)
        state["objects in database", admin_sql.MAINTENANCE] = self._objects
        return state | {(what, ""): self._stamp(name) for name, what in _FILES}

    def _changed(self, connection: Connection, counters: str) -> str:
        """Whether objects were made or changed in the maintenance database, or rows deleted."""
        ((statement,),) = connection.ask(_OBJECTS, self._began).fetchall()
        row = connection.execute(statement.encode()).fetchone()
        # Rows deleted, when the counters were reset, and the newest objects: a walsender is not
        # counted as a session, and its rows are not if it says so (track_counts).
        return f"{row} {counters.split()[3:]}"

    def _stamp(self, name: str) -> str:
        """A file's change time, which no program can set, tells whether it was written."""
        try:
            with Tree.open(self.data_dir) as data:
                status = data.status(name)
        except OSError:
            return ""
        if status is None:
            return ""
        return f"{status.st_ctime_ns} {status.st_size} {status.st_ino}"
