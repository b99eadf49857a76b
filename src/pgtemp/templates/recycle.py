"""Recycling: a new database gets the directory of a dropped database.

CREATE DATABASE copies hundreds of files and DROP DATABASE removes them, although a test changes
only a few. With recycling, PostgreSQL copies and removes almost no files. A database is cloned from
the *stub*: in all catalogs it equals the template, but it has no files. Before a client can
connect, the database gets a recycled directory (supervisor/recycle_files.py), whose files equal the
template's. Before a database is dropped, its directory is moved away to be recycled.

This is safe for four reasons. A database with sessions cannot be renamed, and no client knows the
new name. After a checkpoint, none of its pages remains to be written. DROP DATABASE makes all
processes close its files, and only then are they restored. CREATE DATABASE ends with a checkpoint,
so recovery does not copy the stub again over the recycled directory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from psycopg import Error

from pgtemp.errors import ClusterError, PgTempError
from pgtemp.host import disk_space, procfs
from pgtemp.host.tree import Tree
from pgtemp.sql import admin_sql
from pgtemp.sql.admin_connections import AdminConnections
from pgtemp.sql.connection import Connection
from pgtemp.supervisor import supervision
from pgtemp.supervisor.channel import Channel
from pgtemp.supervisor.leftovers import DATA
from pgtemp.supervisor.protocol import decode, encode

_log = logging.getLogger("pgtemp")
_AFTER = 4  # recycling begins after this many databases; it does not pay off for fewer
_MOST, _MOST_BYTES = 4, 64 << 20  # limits for the stored directories, but at least one is stored
_STUB_BYTES = 1 << 16
# The time limit of the recycling process, which renames directories and copies at most 64 MB.
_ANSWER_SECONDS, _MOST_ANSWER = 2.0, 64 << 10
_LOOK_SECONDS = 0.5
# A standby that replays the WAL would copy the empty stub database.
_REPLAYED = """
SELECT FROM pg_stat_get_wal_senders() UNION ALL
SELECT FROM pg_get_replication_slots() WHERE slot_type = 'physical'
"""
_TABLESPACES = "SELECT FROM pg_tablespace WHERE spcname !~ '^pg_'"


class Reuse:
    """Recycles the directories of one template's clones.

    If recycling does not work, databases are copied and dropped as usual, which only takes longer.
    """

    def __init__(self, admins: AdminConnections, source: str, owner: str) -> None:
        self._admins, self._source, self._owner = admins, source, owner
        self._stub = f"stub_{secrets.token_hex(4)}"
        self._dropping: set[str] = set()  # renamed databases that are being dropped
        self._disposed = 0
        self._available = 0  # recycled directories that can be used
        self._disabled = False
        self._process: Channel | None = None
        self._channel: socket.socket | None = None
        self._buffer = bytearray()
        self._changing = threading.Lock()
        self._requesting = threading.Lock()  # held while a request to the process is pending

    @property
    def works(self) -> bool:
        """Whether directories of dropped databases are recycled."""
        return self._channel is not None and not self._disabled

    def owns(self, name: str) -> bool:
        """Return whether a database of this name is the stub, or is about to be dropped."""
        return name == self._stub or name in self._dropping

    def make(self, connection: Connection, name: str, *, attributes: bool) -> bool:
        """Create a database with a recycled directory.

        Returns:
            False if the caller must create it in the usual way.

        Raises the errors of `admin_sql.clone`.
        """
        with self._changing:
            if not self._available:
                return False
            self._available -= 1
        try:
            replayed = connection.ask(_REPLAYED).fetchone() is not None
            if not replayed:
                admin_sql.clone(
                    connection, name, self._stub, self._owner, self._admins.closing,
                    attributes=False, size=_STUB_BYTES,
                )  # fmt: skip
                if attributes and self._source != admin_sql.BASE:
                    # Do not clone the stub, because a client may have changed it.
                    admin_sql.copy_attributes(connection, self._source, name)
        except BaseException:
            with self._changing:
                self._available += 1
            raise
        if replayed:
            self.end(connection)
            return False
        if self._request("put", _oid_of(connection, name)):
            return True
        with self._changing:
            self._available = 0  # the process was idle and has removed the recycled directories
        admin_sql.drop(connection, name, self._admins.info_of(name))
        return False

    def dispose(self, connection: Connection, name: str, *, size: int) -> None:
        """Drop a database, even if it has sessions, and recycle its directory if possible.

        Args:
            size: the size of the template in bytes.

        Raises the errors of `admin_sql.drop`.
        """
        remaining, oid = name, ""
        if self._can_recycle(connection, size):
            remaining, oid = self._take(connection, name)
        try:
            admin_sql.drop(connection, remaining, self._admins.info_of(remaining))
        finally:
            self._dropping.discard(remaining)
        if oid and self._request("restore", oid, answer=False):
            with self._changing:
                self._available += 1

    def end(self, connection: Connection) -> bool:
        """Disable recycling permanently and remove the recycled directories and the stub.

        Returns:
            Whether recycling was active.
        """
        with self._changing:
            self._disabled, self._available = True, 0
            active = self._channel is not None
        if active:
            self._remove_all(connection)
        return active

    def _remove_all(self, connection: Connection) -> None:
        self._request("leave", "")
        self.close()
        with suppress(Error, PgTempError):
            admin_sql.drop(connection, self._stub, self._admins.info_of(self._stub))

    def close(self) -> None:
        """Stop the process; the recycled directories are removed with the server."""
        with self._requesting:
            self._abandon()

    def _can_recycle(self, connection: Connection, size: int) -> bool:
        """Return whether to recycle the next directory; start the process if necessary."""
        with self._changing:
            self._disposed += 1
            if self._disabled or self._disposed <= _AFTER or self._admins.closing.is_set():
                return False
            if self._process is None:
                try:
                    self._begin(connection)
                except (PgTempError, Error, OSError) as error:
                    self._disabled = True
                    _log.info("directories of databases are not recycled: %s", error)
                    self._remove_all(connection)
                    return False
            enough = self._available >= max(1, min(_MOST, _MOST_BYTES // max(1, size)))
        # `_take` executes CHECKPOINT; on a full disk that makes the server shut down.
        return not enough and not disk_space.is_full(connection.home)

    def _begin(self, connection: Connection) -> None:
        """Create the stub and start the recycling process. Raises PgTempError, Error, OSError."""
        if connection.execute(_TABLESPACES).fetchone() is not None:
            raise ClusterError("the server has tablespaces")
        admin_sql.clone(
            connection, self._stub, self._source, self._owner, self._admins.closing,
            attributes=False,
        )  # fmt: skip
        admin_sql.forbid_connections(connection, self._stub)
        home = connection.home
        with Tree.open(home / DATA) as data:
            owner = os.fstat(data.fd)
        switch = os.geteuid() != owner.st_uid
        self._channel, theirs = socket.socketpair()
        with theirs, open(os.devnull) as nothing:
            self._process = supervision.current().hold(
                [], keep=False, lease=nothing.fileno(), log=theirs.fileno()
            )
        self._process.start_shelf(
            home, owner.st_uid if switch else None, owner.st_gid if switch else None
        )
        if not self._request("begin", _oid_of(connection, self._stub)):
            raise ClusterError("the directory for recycling could not be created")

    def _take(self, connection: Connection, name: str) -> tuple[str, str]:
        """Rename a database and move its directory away, to be recycled.

        Returns:
            The name of the database, which must still be dropped; and its oid, or "" if its
            directory was not moved.
        """
        # A name that no client knows. A repeated call computes the same name.
        gone = "gone_" + hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        oid = _oid_of(connection, name)
        if not oid:
            return gone, ""
        if admin_sql.has_drop_obstacles(connection, name):
            return name, ""
        self._dropping.add(gone)
        admin_sql.disconnect_all(connection, name)
        try:
            admin_sql.rename(connection, name, gone)
        except Error:  # another session connected in the meantime
            self._dropping.discard(gone)
            return name, ""
        connection.execute("CHECKPOINT")
        return gone, oid if self._request("take", oid) else ""

    def _request(self, action: str, oid: str, *, answer: bool = True) -> bool:
        """Send a request to the recycling process.

        Returns:
            Whether the process reported success; without `answer`, whether the request was sent.
        """
        with self._requesting:
            if self._channel is None:
                return False
            try:
                self._channel.settimeout(_ANSWER_SECONDS)
                self._channel.sendall(encode({"do": action, "oid": oid, "answer": answer}))
                if not answer:
                    return True
                reply = self._receive(self._channel)
            except OSError as error:
                _log.info("directories of databases are not recycled: %s", error)
                self._disabled = True
                self._abandon()
                return False
        if reply["error"]:
            _log.debug("a directory could not be recycled: %s", reply["error"])
        return not reply["error"]

    def _receive(self, channel: socket.socket) -> dict[str, Any]:
        """Receive the reply. Raises OSError if it does not arrive in time, or is too long."""
        assert self._process is not None
        deadline = time.monotonic() + _ANSWER_SECONDS
        while (reply := decode(self._buffer)) is None:
            channel.settimeout(_LOOK_SECONDS)
            try:
                data = channel.recv(65536)
            except TimeoutError:
                if time.monotonic() >= deadline or procfs.is_stopped(self._process.pid):
                    raise
                continue
            self._buffer += data
            if not data or len(self._buffer) > _MOST_ANSWER:
                raise ConnectionError("the recycling process has exited")
        return reply

    def _abandon(self) -> None:
        """Close the channel and let the supervisor stop the process; `_requesting` must be held."""
        if self._channel is not None:
            self._channel.close()
        self._channel = None
        if self._process is not None:
            self._process.abandon()


def _oid_of(connection: Connection, name: str) -> str:
    row = connection.ask("SELECT oid FROM pg_database WHERE datname = $1", name).fetchone()
    return str(row[0]) if row is not None else ""
