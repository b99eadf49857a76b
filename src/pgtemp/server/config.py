"""The text of postgresql.conf and pg_hba.conf for a temporary server."""

from __future__ import annotations

from collections.abc import Mapping

# Settings that disable features that a temporary server does not need, and make it start fast and
# use few resources. log_checkpoints is off because CREATE and DROP DATABASE cause checkpoints,
# whose messages would fill the end of the server log. Measured on PostgreSQL 18: small shared
# buffers save 2 ms of start-up, io_method=sync 2 ms and three processes; mmap leaves no files in
# /dev/shm and works with a /dev/shm of 1 MB.
_DEFAULTS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "shared_buffers": "16MB",
    "dynamic_shared_memory_type": "mmap",
    "min_wal_size": "4MB",
    "checkpoint_timeout": "30min",
    "huge_pages": "off",
    "unix_socket_permissions": "0700",
    "log_line_prefix": "%m [%p] %q%u@%d ",
    "log_checkpoints": "off",
    "cluster_name": "pgtemp",
}
_SINCE_18 = {"io_method": "sync"}
# On a small disk, the WAL is limited to a fraction of the disk, so that it cannot fill it; and new
# segments are filled with zeros before they are used (wal_init_zero), because a server that cannot
# write its WAL shuts down and disconnects every client. A bulk load takes one fifteenth longer.
_WAL_MEGABYTES, _WAL_LEAST, _WAL_PART = 256, 8, 8

# A client can reach the socket only through a directory of mode 0700, so it needs no password.
HBA = """\
# TYPE   DATABASE     USER  ADDRESS  METHOD
local    all          all            trust
local    replication  all            trust
host     all          all   all      scram-sha-256
host     replication  all   all      scram-sha-256
"""
_HBA_OWN_LINE = """\
# pgtemp's own connections, through the private socket
local    all          {user}            trust
"""


def postgresql_conf(
    existing: str,
    *,
    major: int,
    given: str,
    settings: Mapping[str, str],
    existing_first: bool,
    disk: int,
) -> str:
    """Compose the text of a postgresql.conf; later settings override earlier ones.

    Args:
        existing: the text of the data directory's file.
        given: the text of a file that the user specified.
        settings: individual settings of the user.
        existing_first: true if `existing` is initdb's and pgtemp's defaults override it; false if
            it is a user's choice and overrides them.
        disk: the size in bytes of the server's disk.
    """
    wal = max(_WAL_LEAST, min(_WAL_MEGABYTES, (disk >> 20) // _WAL_PART))
    small = "on" if wal < _WAL_MEGABYTES else "off"
    defaults = _DEFAULTS | {"max_wal_size": f"{wal}MB", "wal_init_zero": small}
    if major >= 18:
        defaults |= _SINCE_18
    ours = "# from pgtemp\n" + _lines(defaults)
    parts = [existing, ours] if existing_first else [ours, existing]
    if given:
        parts.append("# from the postgresql.conf that was given\n" + given)
    if settings:
        parts.append("# from the settings that were given\n" + _lines(settings))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def pg_hba_conf(given: str | None, superuser: str) -> str:
    """The text of pg_hba.conf: pgtemp's, or the user's after the one line that pgtemp needs."""
    if given is None:
        return HBA
    quoted = superuser.replace('"', '""')
    return _HBA_OWN_LINE.format(user=f'"{quoted}"') + given


def _lines(settings: Mapping[str, object]) -> str:
    return "".join(f"{name} = {_quote(str(value))}\n" for name, value in settings.items())


def _quote(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
