"""What a tenant leaves in a server beside its database: roles, settings, databases made by hand.

All of these are cluster-wide, so that a database does not isolate them and dropping it does not
take them away. They are found by comparing the shared catalogs with what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg import sql

from pgtemp.databases.connections import Connection
from pgtemp.host.tree import Tree

# What it is, its name, the database that it goes with, and the rest of it.
_SHARED = """
SELECT 'role', rolname::text, NULL, a::text FROM pg_authid a
UNION ALL
SELECT 'membership', concat_ws(' ', roleid::regrole, 'of', member::regrole, 'by',
  grantor::regrole), NULL, m::text FROM pg_auth_members m
UNION ALL
SELECT 'comment', concat_ws(' ', classoid::regclass, objoid), NULL, description
  FROM pg_shdescription WHERE classoid <> 'pg_database'::regclass
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
SELECT 'replication slot', slot_name::text, NULL, '' FROM pg_replication_slots
  WHERE database IS NULL
UNION ALL
SELECT 'database', datname::text, datname::text, concat_ws(' ', datdba, datistemplate,
  datallowconn, datconnlimit, datacl::text) FROM pg_database
"""
_ROLE, _SYSTEM = "role", "ALTER SYSTEM"
# What a superuser may have written there, by a program if need be, is read at the next reload.
_FILES = (
    ("postgresql.auto.conf", _SYSTEM),
    *((name, name) for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf")),
)
State = dict[tuple[str, str], str]


@dataclass(slots=True)
class Residue:
    """What there was in a server, and what has come to it since.

    Attributes:
        ours: whether a database of this name is one of pgtemp's own, which come and go.
    """

    data_dir: Path
    ours: Callable[[str], bool]
    _before: State = field(default_factory=dict)
    _touched: int = 0

    def accept(self, connection: Connection) -> None:
        """Take what there is now for what there should be."""
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
            "SELECT a::text FROM pg_authid a WHERE rolname = %s", [name]
        ).fetchone()
        if row is not None:
            self._before[_ROLE, name] = row[0]

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
        except psycopg.Error:
            pass  # something that it owns is left as well
        return self.found(connection)

    def _now(self, connection: Connection) -> State:
        rows = connection.ask(_SHARED).fetchall()
        state = {
            (kind, name): row
            for kind, name, database, row in rows
            if database is None or not self.ours(database)
        }
        return state | {(what, ""): self._stamp(name) for name, what in _FILES}

    def _stamp(self, name: str) -> str:
        """A file's time and size tell whether somebody has written it."""
        try:
            with Tree.open(self.data_dir) as data:
                status = data.status(name)
        except OSError:
            return ""
        if status is None:
            return ""
        return f"{status.st_mtime_ns} {status.st_size} {status.st_ino}"
