"""Persist the data of a server, and start a server on persisted data."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Self

from pgtemp.errors import OptionError
from pgtemp.host import disk_space, file_copy, identity, ports, user_paths
from pgtemp.host.tree import Tree
from pgtemp.images.source import NEVER_COPIED, Directory
from pgtemp.options.server import StrPath
from pgtemp.programs import search
from pgtemp.server import config, rundir
from pgtemp.server.postmaster import Postmaster
from pgtemp.server.spec import ServerSpec
from pgtemp.sql import admin_sql, server_setup
from pgtemp.sql.connection import connected
from pgtemp.sql.passwords import random_secret
from pgtemp.sql.persisted_note import Note, put_note, read_note
from pgtemp.supervisor.leftovers import DATA
from pgtemp.uri import ConnectionInfo


def store(postmaster: Postmaster, directory: Path, note: Note) -> None:
    """Shut a server down and copy its data to a directory, which must not exist yet.

    Raises:
        ClusterError: the directory is not writable; nothing is left behind.
    """
    postmaster.halt()
    with disk_space.writing(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with Tree.open(postmaster.data_dir) as data:
            listing = file_copy.list_tree(data, NEVER_COPIED)
            with rundir.stored(directory, postmaster.spec.owner) as (tree, fresh):
                for name in listing.dirs:
                    fresh.make_directory(name)
                file_copy.copy_files(data, fresh, listing.files)
                fresh.hand_over(*listing.dirs, "")
                put_note(tree, note)


def act_as_owner(directory: StrPath) -> None:
    """If the caller is root, drop all privileges except those of the user who owns persisted data.

    This is necessary because that user can change the directory at any time. Nothing is dropped if
    the directory belongs to root and only the data in it belongs to another user.

    Raises:
        OptionError: the directory contains no persisted data, or that user cannot run this program.
    """
    path = rundir.kept_at(Path(directory))
    with user_paths.open_tree(path) as tree:
        uid = os.fstat(tree.fd).st_uid
    if os.geteuid() == 0 != uid:
        user = identity.choose_uid(uid)
        if blocked := user.blocked_at(Path(sys.executable).resolve()):
            raise OptionError(
                f"{path} belongs to {user.name}, who cannot enter {blocked}, which contains Python",
                remedy=f"install pgtemp where {user.name} can run it, and open it as that user",
            )
        identity.become(uid)


class PersistedDB:
    """A server that runs on persisted data in place; the data remains when the server stops.

    Args:
        directory: the directory that `--persist` printed, or the `data` directory in it.
        dbname: the database of `info`; None selects the database for which the data was persisted.
        port: TCP port; None chooses a free one.
        bin_dir: the directory of PostgreSQL's programs; None searches for programs of the data's
            version.

    Raises:
        OptionError: the directory contains no persisted data, or is in use.
        PgTempError: the server could not be started.
    """

    def __init__(
        self,
        directory: StrPath,
        *,
        dbname: str | None = None,
        port: int | None = None,
        bin_dir: StrPath | None = None,
    ) -> None:
        path = rundir.kept_at(Path(directory))
        self.directory = path
        self.note = read_note(path)
        self._dbname = dbname if dbname is not None else self.note.dbname
        source = Directory(path / DATA)
        owner, version = identity.choose_uid(source.uid), source.version
        programs = search.find(bin_dir, version).within_reach(owner)
        self.version = programs.version
        self._postmaster = Postmaster(
            ServerSpec(
                installation=programs,
                owner=owner,
                source=source,
                conf=_unchanged,
                hba=config.HBA,
                addresses=(ports.LOOPBACK,),
                port=port,
                keep=True,
            ),
            existing=path,
        )
        self.info: ConnectionInfo

    def __enter__(self) -> Self:
        user, dbname = self.note.user, self._dbname
        self._postmaster.start()
        try:
            secret = random_secret()
            private = server_setup.private_info(self._postmaster, user, admin_sql.MAINTENANCE)
            with connected(private) as connection:
                if not admin_sql.exists(connection, dbname):
                    raise OptionError(
                        f"{self.directory} does not contain a database {dbname!r}",
                        remedy="specify one of the databases below",
                        details=admin_sql.databases(connection),
                    )
                admin_sql.ensure_role(connection, user, secret)
        except BaseException:
            self._postmaster.stop()
            raise
        self.info = ConnectionInfo(
            host=ports.LOOPBACK,
            port=self._postmaster.port,
            user=user,
            password=secret.password,
            dbname=dbname,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._postmaster.stop()


def _unchanged(existing: str) -> str:
    return existing
