"""Data that was kept: what it was, and a server on it again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from pgtemp.databases import admin, provision
from pgtemp.databases.secret import random_secret
from pgtemp.errors import OptionError
from pgtemp.host import identity
from pgtemp.options import StrPath
from pgtemp.server import conf, image, imagebuild, installation
from pgtemp.server.cluster import Blueprint, Cluster
from pgtemp.server.remains import DATA
from pgtemp.uri import ConnectionInfo

NOTE = "pgtemp.json"
_HOST = "127.0.0.1"


def write_note(home: Path, user: str, dbname: str) -> None:
    """Remember, beside data that is kept, whose it was."""
    # By a descriptor and a rename: the server's user may have put a link there.
    directory = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        fresh = f".{NOTE}.{os.getpid()}"
        with open(os.open(fresh, flags, 0o600, dir_fd=directory), "w") as file:
            json.dump({"user": user, "dbname": dbname}, file)
        os.rename(fresh, NOTE, src_dir_fd=directory, dst_dir_fd=directory)
    finally:
        os.close(directory)


class KeptDB:
    """A server on kept data, in place; the data stays when it ends.

    Args:
        directory: what `--persist` printed, or the `data` directory in it.
        port: TCP port; None chooses a free one.
        bin_dir: folder of PostgreSQL's programs; None finds those of the data's version.

    Raises:
        OptionError: the directory is not one that was kept, or is in use.
        PgTempError: the server could not be started.
    """

    def __init__(
        self, directory: StrPath, *, port: int | None = None, bin_dir: StrPath | None = None
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
                addresses=(_HOST,),
                port=port,
                keep=True,
            ),
            existing=path,
        )
        self.info: ConnectionInfo

    def __enter__(self) -> Self:
        note = read_note(self.directory)
        self._cluster.start()
        try:
            secret = random_secret()
            private = provision.private_info(self._cluster, note["user"], "postgres")
            with admin.connected(private) as connection:
                admin.ensure_role(connection, note["user"], secret)
        except BaseException:
            self._cluster.stop()
            raise
        self.info = ConnectionInfo(
            host=_HOST, port=self._cluster.port, password=secret.password, **note
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cluster.stop()


def read_note(home: Path) -> dict[str, str]:
    """Whose data it was: user and dbname."""
    try:
        said = json.loads((home / NOTE).read_text())
        return {"user": str(said["user"]), "dbname": str(said["dbname"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"user": imagebuild.SUPERUSER, "dbname": "postgres"}


def _unchanged(existing: str) -> str:
    return existing
