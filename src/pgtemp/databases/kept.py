"""Data that was kept: what it was, and a server on it again."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from pgtemp.databases import admin, connections, provision
from pgtemp.databases.secret import random_secret
from pgtemp.errors import ClusterError, OptionError
from pgtemp.host import copying, identity, ports, room
from pgtemp.options import StrPath
from pgtemp.server import conf, image, imagebuild, installation
from pgtemp.server.cluster import Blueprint, Cluster
from pgtemp.server.remains import DATA
from pgtemp.uri import ConnectionInfo

_log = logging.getLogger("pgtemp")
NOTE = "pgtemp.json"


@dataclass(frozen=True, slots=True)
class Note:
    """What stands beside data that is kept.

    Attributes:
        user: whose it was.
        dbname: the database.
        databases: what each of several databases is of.
    """

    user: str
    dbname: str
    databases: Mapping[str, str] = field(default_factory=dict)


def write_note(home: Path, note: Note) -> None:
    """Remember, beside data that is kept, whose it was.

    Raises:
        ClusterError: it cannot be written; the data can be opened all the same, as anybody's.
    """
    # By a descriptor and a rename: the server's user may have put a link there.
    with room.writing(home / NOTE), ExitStack() as held:
        directory = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        held.callback(os.close, directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        fresh = f".{NOTE}.{os.getpid()}"
        try:
            with open(os.open(fresh, flags, 0o600, dir_fd=directory), "w") as file:
                json.dump(asdict(note), file)
            os.rename(fresh, NOTE, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:
            with suppress(OSError):
                os.unlink(fresh, dir_fd=directory)
            raise


def try_note(home: Path, note: Note) -> None:
    """As `write_note`, but what goes wrong is only logged: the data itself is kept."""
    try:
        write_note(home, note)
    except ClusterError as error:
        _log.error("%s", error)


def store(cluster: Cluster, directory: Path, note: Note) -> None:
    """Shut a server down and copy its data to a directory, which must not be there yet.

    Raises:
        ClusterError: it could not be written; nothing of it is left.
    """
    cluster.halt()
    owner = cluster.blueprint.owner
    fresh = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        with room.writing(directory):
            directory.parent.mkdir(parents=True, exist_ok=True)
            fresh.mkdir(mode=0o700)
            (fresh / DATA).mkdir(mode=0o700)
            owner.own(fresh / DATA)
            listing = copying.list_tree(cluster.data_dir, imagebuild.NEVER_COPIED)
            copying.make_dirs(fresh / DATA, listing.dirs, owner)
            copying.copy_files(cluster.data_dir, fresh / DATA, listing.files, owner)
            write_note(fresh, note)
            owner.own(fresh)
            fresh.rename(directory)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


class KeptDB:
    """A server on kept data, in place; the data stays when it ends.

    Args:
        directory: what `--persist` printed, or the `data` directory in it.
        dbname: the database to tell about; None is the one that the data was kept for.
        port: TCP port; None chooses a free one.
        bin_dir: folder of PostgreSQL's programs; None finds those of the data's version.

    Raises:
        OptionError: the directory is not one that was kept, or is in use.
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
        path = Path(directory).absolute()
        if path.name == DATA and (path / "PG_VERSION").exists():
            path = path.parent
        data = path / DATA
        if not (data / "PG_VERSION").exists():
            raise OptionError(
                f"{path} holds no data that pgtemp kept",
                remedy="name a directory that --persist printed",
            )
        self.directory = path
        self.note = read_note(path)
        self._dbname = dbname if dbname is not None else self.note.dbname
        owner = identity.of(data)
        version = (data / "PG_VERSION").read_text().strip()
        programs = installation.find(bin_dir, version).within_reach(owner)
        self.version = programs.version
        self._cluster = Cluster(
            Blueprint(
                installation=programs,
                owner=owner,
                source=image.Directory(data),
                conf=_unchanged,
                hba=conf.HBA,
                addresses=(ports.LOOPBACK,),
                port=port,
                keep=True,
            ),
            existing=path,
        )
        self.info: ConnectionInfo

    def __enter__(self) -> Self:
        user, dbname = self.note.user, self._dbname
        self._cluster.start()
        try:
            secret = random_secret()
            private = provision.private_info(self._cluster, user, admin.MAINTENANCE)
            with connections.connected(private) as connection:
                if not admin.exists(connection, dbname):
                    raise OptionError(
                        f"there is no database {dbname!r} in {self.directory}",
                        remedy="name one of those below",
                        details=admin.databases(connection),
                    )
                admin.ensure_role(connection, user, secret)
        except BaseException:
            self._cluster.stop()
            raise
        self.info = ConnectionInfo(
            host=ports.LOOPBACK,
            port=self._cluster.port,
            user=user,
            password=secret.password,
            dbname=dbname,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cluster.stop()


def read_note(home: Path) -> Note:
    """Whose data it was."""
    try:
        said = json.loads((home / NOTE).read_text())
        return Note(str(said["user"]), str(said["dbname"]), dict(said.get("databases", {})))
    except (OSError, ValueError, KeyError, TypeError):
        return Note(imagebuild.SUPERUSER, admin.MAINTENANCE)


def _unchanged(existing: str) -> str:
    return existing
