"""A new database gets the directory of a database that was dropped.

CREATE DATABASE copies hundreds of files and DROP DATABASE removes them, although a test changed
only a few. With recycling PostgreSQL copies and removes almost nothing. A database is cloned from
the *stub*: in all catalogs it equals the template, but it has no files. Before a client can
connect, the database gets a recycled directory (supervisor/recycle_files.py), whose files equal the
template's. Before a database is dropped, its directory is moved away to be recycled.

This is safe for four reasons. A database with sessions cannot be renamed, and no client knows the
new name. After a checkpoint no page of it waits to be written. DROP DATABASE makes all processes
close its files, and only then are they restored. CREATE DATABASE ends with a checkpoint, so
recovery does not copy the stub again over the recycled directory.
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
from pgtemp.sql.admin_connections import AdminConnections, Connection
from pgtemp.supervisor import supervision
from pgtemp.supervisor.leftovers import DATA
from pgtemp.supervisor.protocol import decode, encode

_log = logging.getLogger("pgtemp")
_AFTER = 4  # databases that are dropped in the usual way; who has no more needs no shelf
_MOST, _MOST_BYTES = 4, 64 << 20  # directories on the shelf; of large ones, one
_STUB_BYTES = 1 << 16
# It renames directories, and copies 64 MB at most. Clients wait for it.
_ANSWER_SECONDS, _MOST_ANSWER = 2.0, 64 << 10
_LOOK_SECONDS = 0.5
# Whoever replays the server's log would copy the stub, and have no files.
_REPLAYED = """
SELECT FROM pg_stat_get_wal_senders() UNION ALL
SELECT FROM pg_get_replication_slots() WHERE slot_type = 'physical'
"""
_ELSEWHERE = "SELECT FROM pg_tablespace WHERE spcname !~ '^pg_'"


class Reuse:
    """The shelf of one template's clones. Where it does not work, nothing is lost but time."""

    def __init__(self, admins: AdminConnections, source: str, owner: str) -> None:
        self._admins, self._source, self._owner = admins, source, owner
        self._stub = f"stub_{secrets.token_hex(4)}"
        self._leaving: set[str] = set()
        self._disposed = 0
        self._shelved = 0
        self._refused = False
        self._process: supervision.Process | None = None
        self._channel: socket.socket | None = None
        self._buffer = bytearray()
        self._changing = threading.Lock()
        self._talking = threading.Lock()

    @property
    def works(self) -> bool:
        """Whether directories are put on the shelf."""
        return self._channel is not None and not self._refused

    def owns(self, name: str) -> bool:
        """Whether a database of this name is the stub, or one that is about to be dropped."""
        return name == self._stub or name in self._leaving

    def make(self, connection: Connection, name: str, *, attributes: bool) -> bool:
        """Make a database of what is on the shelf; False where it has to be made otherwise.

        Raises what `admin.clone` raises.
        """
        with self._changing:
            if not self._shelved:
                return False
            self._shelved -= 1
        try:
            replayed = connection.ask(_REPLAYED).fetchone() is not None
            if not replayed:
                admin_sql.clone(
                    connection, name, self._stub, self._owner, self._admins.closing,
                    attributes=attributes, size=_STUB_BYTES,
                )  # fmt: skip
        except BaseException:
            with self._changing:
                self._shelved += 1
            raise
        if replayed:
            self.end(connection)
            return False
        if self._do("put", _oid_of(connection, name)):
            return True
        with self._changing:
            self._shelved = 0  # it was idle, and has cleared the shelf
        admin_sql.drop(connection, name, self._admins.elsewhere(name))
        return False

    def dispose(self, connection: Connection, name: str, *, attributes: bool, size: int) -> None:
        """Drop a database, whoever is in it, and keep its directory where that may be of use.

        Args:
            attributes, size: of the template, as for `admin.clone`.

        Raises what `admin.drop` raises.
        """
        left, oid = name, ""
        if self._has_use(connection, attributes, size):
            left, oid = self._take(connection, name)
        try:
            admin_sql.drop(connection, left, self._admins.elsewhere(left))
        finally:
            self._leaving.discard(left)
        if oid and self._do("restore", oid, answer=False):
            with self._changing:
                self._shelved += 1

    def end(self, connection: Connection) -> bool:
        """Take away all that is kept for this, for good; whether there was any."""
        with self._changing:
            self._refused, self._shelved = True, 0
            there = self._channel is not None
        if there:
            self._take_away(connection)
        return there

    def _take_away(self, connection: Connection) -> None:
        self._do("leave", "")
        self.close()
        with suppress(Error, PgTempError):
            admin_sql.drop(connection, self._stub, self._admins.elsewhere(self._stub))

    def close(self) -> None:
        """End the process; the server with all that is in it goes by itself."""
        with self._talking:
            self._abandon()

    def _has_use(self, connection: Connection, attributes: bool, size: int) -> bool:
        with self._changing:
            self._disposed += 1
            if self._refused or self._disposed <= _AFTER or self._admins.closing.is_set():
                return False
            if self._process is None:
                try:
                    self._begin(connection, attributes)
                except (PgTempError, Error, OSError) as error:
                    self._refused = True
                    _log.info("directories of databases are not used again: %s", error)
                    self._take_away(connection)
                    return False
            full = self._shelved >= max(1, min(_MOST, _MOST_BYTES // max(1, size)))
        # A checkpoint on a full disk ends the server.
        return not full and not disk_space.is_full(connection.home)

    def _begin(self, connection: Connection, attributes: bool) -> None:
        if connection.execute(_ELSEWHERE).fetchone() is not None:
            raise ClusterError("there are tablespaces")
        admin_sql.clone(
            connection, self._stub, self._source, self._owner, self._admins.closing,
            attributes=attributes,
        )  # fmt: skip
        admin_sql.close_door(connection, self._stub)
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
        if not self._do("begin", _oid_of(connection, self._stub)):
            raise ClusterError("the shelf could not be made")

    def _take(self, connection: Connection, name: str) -> tuple[str, str]:
        """Move a database's directory to the shelf.

        Returns:
            The name of the database, which has still to be dropped; its oid, "" if it has its
            directory still.
        """
        # A name that nobody knows; the same if this was begun once already.
        gone = "gone_" + hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        oid = _oid_of(connection, name)
        if not oid:
            return gone, ""
        if admin_sql.clings(connection, name):
            return name, ""
        self._leaving.add(gone)
        admin_sql.empty(connection, name)
        try:
            admin_sql.rename(connection, name, gone)
        except Error:  # somebody has come meanwhile
            self._leaving.discard(gone)
            return name, ""
        connection.execute("CHECKPOINT")
        return gone, oid if self._do("take", oid) else ""

    def _do(self, what: str, oid: str, *, answer: bool = True) -> bool:
        """Have the shelf's process do something; whether it was done, or it was told to."""
        with self._talking:
            if self._channel is None:
                return False
            try:
                self._channel.settimeout(_ANSWER_SECONDS)
                self._channel.sendall(encode({"do": what, "oid": oid, "answer": answer}))
                if not answer:
                    return True
                said = self._answer(self._channel)
            except OSError as error:
                _log.info("directories of databases are not used again: %s", error)
                self._refused = True
                self._abandon()
                return False
        if said["error"]:
            _log.debug("a directory could not be used again: %s", said["error"])
        return not said["error"]

    def _answer(self, channel: socket.socket) -> dict[str, Any]:
        """What the process says. Raises OSError if it says nothing, or too much, in time."""
        assert self._process is not None
        deadline = time.monotonic() + _ANSWER_SECONDS
        while (said := decode(self._buffer)) is None:
            channel.settimeout(_LOOK_SECONDS)
            try:
                data = channel.recv(65536)
            except TimeoutError:
                if time.monotonic() >= deadline or procfs.is_stopped(self._process.pid):
                    raise
                continue
            self._buffer += data
            if not data or len(self._buffer) > _MOST_ANSWER:
                raise ConnectionError("its process has ended")
        return said

    def _abandon(self) -> None:
        """Have the process ended; with `_talking` held."""
        if self._channel is not None:
            self._channel.close()
        self._channel = None
        if self._process is not None:
            self._process.abandon()


def _oid_of(connection: Connection, name: str) -> str:
    row = connection.ask("SELECT oid FROM pg_database WHERE datname = $1", name).fetchone()
    return str(row[0]) if row is not None else ""
