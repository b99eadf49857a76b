"""The note in the run directory of persisted data: its user and its databases."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pgtemp.errors import ClusterError
from pgtemp.host import disk_space, user_paths
from pgtemp.host.tree import Tree
from pgtemp.images import initdb
from pgtemp.sql import admin_sql

_log = logging.getLogger("pgtemp")
NOTE = "pgtemp.json"
_NOTE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Note:
    """The content of the note.

    Attributes:
        user: the user of the data.
        dbname: the database.
        databases: if there are several databases, the origin of each, by database name.
    """

    user: str
    dbname: str
    databases: Mapping[str, str] = field(default_factory=dict)


def write_note(directory: Path, note: Note) -> None:
    """Write the note into the run directory of persisted data.

    Raises:
        ClusterError: it could not be written. The data can still be opened, with the default user
            and database.
    """
    with disk_space.writing(directory / NOTE), Tree.open(directory) as tree:
        put_note(tree, note)


def put_note(tree: Tree, note: Note) -> None:
    """Write the note into an open run directory. Raises OSError."""
    tree.write(NOTE, json.dumps(asdict(note)).encode())


def try_note(directory: Path, note: Note) -> None:
    """Write the note; an error is only logged, because the data itself is persisted."""
    try:
        write_note(directory, note)
    except ClusterError as error:
        _log.error("%s", error)


def read_note(directory: Path) -> Note:
    """Read the note; if it cannot be read, return the default user and database."""
    try:
        with user_paths.open_tree(directory) as tree:
            fields = json.loads(tree.read(NOTE, _NOTE_BYTES))
        return Note(str(fields["user"]), str(fields["dbname"]), dict(fields.get("databases", {})))
    except (OSError, ValueError, KeyError, TypeError):
        return Note(initdb.SUPERUSER, admin_sql.MAINTENANCE)
