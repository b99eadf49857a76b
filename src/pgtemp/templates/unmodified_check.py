"""Prove that a clone is still, byte for byte, the copy that was handed out.

A client can disable PostgreSQL's counters, so they only serve as a quick first test. The proof is
physical: every change of a database changes a page in the shared buffers or a file in its
directory. A clone is unmodified if none of its buffers is dirty, none of its files was written
since it was handed out, and the shared catalogs contain the same information about it as about its
source.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import LiteralString

from psycopg import errors

from pgtemp.host.tree import Tree
from pgtemp.sql.connection import Connection

# The kernel sets the times of files to the time of its last tick, which may be 10 ms in the past.
_TICK_NANOSECONDS = 20_000_000
_QUIET = """
SELECT d.oid FROM pg_database d
  JOIN pg_database source ON source.datname = $1
  LEFT JOIN pg_stat_database s ON s.datid = d.oid
WHERE d.datname = $2
  AND coalesce(s.tup_inserted + s.tup_updated + s.tup_deleted, 0) = 0
  AND NOT EXISTS (SELECT FROM pg_stat_activity WHERE datid = d.oid)
  AND NOT EXISTS (SELECT FROM pg_prepared_xacts WHERE database = d.datname)
  AND NOT EXISTS (SELECT FROM pg_replication_slots WHERE database = d.datname)
  AND NOT EXISTS (SELECT FROM pg_subscription WHERE subdbid = d.oid)
  AND NOT EXISTS (SELECT FROM pg_tablespace WHERE spcname !~ '^pg_')
  AND d.datdba = (SELECT oid FROM pg_roles WHERE rolname = $3)
  AND d.datallowconn AND NOT d.datistemplate
  AND d.datconnlimit = -1
  AND d.datacl IS NOT DISTINCT FROM
      CASE source.datname WHEN 'template1' THEN NULL ELSE source.datacl END
  AND NOT EXISTS (SELECT FROM pg_shdescription
    WHERE classoid = 'pg_database'::regclass AND objoid = d.oid)
  AND (SELECT array_agg((setrole, setconfig) ORDER BY setrole) FROM pg_db_role_setting
       WHERE setdatabase = d.oid) IS NOT DISTINCT FROM
      (SELECT array_agg((setrole, setconfig) ORDER BY setrole) FROM pg_db_role_setting
       WHERE setdatabase = source.oid)
"""
# The C function of the extension pg_buffercache. All sessions in the database could see the
# extension itself.
_DECLARE: LiteralString = """
CREATE FUNCTION {}.pgtemp_buffers() RETURNS SETOF record
AS '$libdir/pg_buffercache', 'pg_buffercache_pages' LANGUAGE C
"""
_CLEAN: LiteralString = """
SELECT NOT EXISTS (SELECT FROM {}.pgtemp_buffers() AS (
  bufferid int, relfilenode oid, reltablespace oid, reldatabase oid, relforknumber int2,
  relblocknumber int8, isdirty bool, usagecount int2, pinning_backends int4)
WHERE isdirty AND reldatabase = $1)
"""
SESSION: LiteralString = "pg_temp"  # the schema of objects that only their own session can use


def declare(connection: Connection, schema: LiteralString) -> None:
    """Create a schema with the function that `is_unmodified` needs, if the server provides it."""
    connection.execute("CREATE SCHEMA " + schema)
    with suppress(errors.UndefinedFile, errors.UndefinedFunction):
        connection.execute(_DECLARE.format(schema))


def is_unmodified(
    connection: Connection,
    data_dir: Path,
    dbname: str,
    *,
    source: str,
    owner: str,
    since: int,
    schema: LiteralString,
) -> bool:
    """Return whether a clone is provably unmodified; False if the server has no pg_buffercache.

    Args:
        source: the database that it was cloned from.
        owner: the role that originally owned it.
        since: when it was handed out, in nanoseconds since the epoch.
        schema: where `declare` has created the function; in SESSION it is created when needed.
    """
    row = connection.ask(_QUIET, source, dbname, owner).fetchone()
    if row is None:
        return False
    # Check the files last: a buffer that was written out in the meantime has changed its file.
    return _has_no_dirty_buffer(connection, row[0], schema) and _is_older(
        data_dir, f"base/{row[0]}", since - _TICK_NANOSECONDS
    )


def _has_no_dirty_buffer(connection: Connection, oid: int, schema: LiteralString) -> bool:
    clean = _CLEAN.format(schema)
    try:
        try:
            row = connection.ask(clean, str(oid)).fetchone()
        except (errors.UndefinedFunction, errors.InvalidSchemaName):
            if schema != SESSION:
                return False
            connection.execute(_DECLARE.format(schema))
            row = connection.ask(clean, str(oid)).fetchone()
    except (errors.UndefinedFile, errors.UndefinedFunction):
        return False
    return row is not None and bool(row[0])


def _is_older(data_dir: Path, name: str, when: int) -> bool:
    """Return whether a directory and all files in it were last changed before that time.

    Programs can set the time of the last write (mtime), but not the time of the last change.
    """
    try:
        with Tree.open(data_dir) as data:
            directory = data.status(name)
            files = [status for _, status in data.entries(name)]
    except OSError:
        return False
    return directory is not None and all(
        status.st_ctime_ns < when for status in (directory, *files)
    )
