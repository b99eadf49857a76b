"""The text of postgresql.conf and pg_hba.conf for a temporary server."""

from __future__ import annotations

from collections.abc import Mapping

# What a server that is thrown away need not do, and what makes it start fast and stay small.
# CREATE and DROP DATABASE make checkpoints, whose lines would be all there is in the log's end.
# Measured on PostgreSQL 18: small shared buffers save 2 ms of start-up, io_method=sync 2 ms and
# three processes; mmap leaves nothing in /dev/shm and works where that is 1 MB.
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
# On a small disk PostgreSQL's log gets a part of it, lest it fill the disk alone; and room that is
# there before it is written, because a server that cannot write its log ends with all who are in
# it. That costs a bulk load one part in fifteen.
_WAL_MEGABYTES, _WAL_LEAST, _WAL_PART = 256, 8, 8

# Whoever reaches the socket reached a directory of mode 0700.
HBA = """\
# TYPE   DATABASE     USER  ADDRESS  METHOD
local    all          all            trust
local    replication  all            trust
host     all          all   all      scram-sha-256
host     replication  all   all      scram-sha-256
"""
_HBA_OWN_DOOR = """\
# pgtemp's own way in, through the private socket
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
    """Put a postgresql.conf together; what comes later wins.

    Args:
        existing: what the data directory has.
        given: the text of a file the user gave.
        settings: the user's single settings.
        existing_first: `existing` is initdb's, which our defaults improve on; else it is
            somebody's choice, which beats them.
        disk: bytes that the disk has on which the server is to be.
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
    """The text of pg_hba.conf: ours, or the user's behind the one line pgtemp needs."""
    if given is None:
        return HBA
    quoted = superuser.replace('"', '""')
    return _HBA_OWN_DOOR.format(user=f'"{quoted}"') + given


def _lines(settings: Mapping[str, object]) -> str:
    return "".join(f"{name} = {_quote(str(value))}\n" for name, value in settings.items())


def _quote(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
