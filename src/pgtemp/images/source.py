"""The sources of data directories: the interface, and a directory that the user specifies.

A source is copied in four parts, which image.py describes; the defaults of the interface copy
nothing after the first part.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pgtemp.errors import ClusterError, OptionError
from pgtemp.host import file_copy, procfs, user_paths
from pgtemp.host.file_copy import ChangedError
from pgtemp.host.tree import Tree

CONTROL = "global/pg_control"
CONF = "postgresql.conf"
# Not copied: files of a running server, and the server logs of an earlier one.
NEVER_COPIED = ("postmaster.pid", "postmaster.opts", "log")
_SHORT = 4096
_CONTROL_BYTES = 8192  # PG_CONTROL_FILE_SIZE


class Source(Protocol):
    """A source from which a server's data directory is copied."""

    @property
    def identity(self) -> str:
        """A string that identifies the source; it is the same for the same bytes."""

    def resolve(self) -> Copyable:
        """Return the object to copy, which does not change during the copy; build it if necessary.

        Raises PgTempError if it cannot be built.
        """

    def repair(self, damage: ChangedError) -> None:
        """Rebuild the damaged source, or raise ClusterError."""


class Copyable:
    """A data directory that is copied in several parts. All methods raise OSError."""

    __slots__ = ()

    @property
    def extent(self) -> tuple[int, int]:
        """The number of bytes and the number of files."""
        raise NotImplementedError

    def begin(self, target: Tree) -> None:
        """Copy all files that a postmaster needs to start."""
        raise NotImplementedError

    def first(self, target: Tree) -> None:
        """Copy the database `postgres`."""

    def rest(self, target: Tree) -> None:
        """Copy the templates."""

    def warm(self, target: Tree) -> None:
        """Add the relation cache files."""

    def set_password(self, target: Tree, verifier: str) -> bool:
        """Store the superuser's verifier; False if its position is unknown, and SQL is needed."""
        return False


@dataclass(frozen=True, slots=True)
class Directory(Copyable):
    """A data directory that a user prepared; it is never changed.

    It is copied completely before the server starts, because after a crash the server reads the
    databases at start-up.
    """

    path: Path

    @property
    def identity(self) -> str:
        with user_paths.open_tree(self.path) as data:
            return f"{self.path} {control_hash(data)}"

    @property
    def uid(self) -> int:
        """The user that owns it. Raises OSError."""
        with user_paths.open_tree(self.path) as data:
            return os.fstat(data.fd).st_uid

    @property
    def version(self) -> str:
        """The major version of PostgreSQL that created it. Raises OptionError."""
        try:
            with user_paths.open_tree(self.path) as data:
                return data.read("PG_VERSION", _SHORT).decode().strip()
        except (OSError, ValueError) as error:
            raise OptionError(
                f"{self.path} cannot be used as a data directory: {error}",
                remedy="specify a PostgreSQL data directory",
            ) from error

    def is_in_use(self) -> bool:
        """Whether the server whose pid is in its postmaster.pid is running."""
        try:
            with user_paths.open_tree(self.path) as data:
                return procfs.lives(int(data.read("postmaster.pid", _SHORT).split(b"\n")[0]))
        except (OSError, ValueError, OverflowError):
            return False

    @property
    def extent(self) -> tuple[int, int]:
        with user_paths.open_tree(self.path) as data:
            listing = file_copy.list_tree(data, NEVER_COPIED)
        return listing.size, len(listing.files)

    def resolve(self) -> Copyable:
        return self

    def begin(self, target: Tree) -> None:
        with user_paths.open_tree(self.path) as data:
            listing = file_copy.list_tree(data, NEVER_COPIED)
            file_copy.copy_listing(data, target, listing)
        target.hand_over(*listing.dirs)

    def repair(self, damage: ChangedError) -> None:
        raise ClusterError(
            f"{self.path} changed while it was copied: {damage}",
            remedy="first stop the server that runs on it",
        )


def control_hash(data: Tree) -> str:
    """The hash of the control file, which contains the state and the system identifier."""
    try:
        return hashlib.sha256(data.read(CONTROL, _CONTROL_BYTES)).hexdigest()
    except OSError:
        return ""
