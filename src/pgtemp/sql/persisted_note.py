"""The note beside persisted data: the user and the databases to which it belongs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pgtemp.errors import ClusterError
from pgtemp.host import disk_space, reach
from pgtemp.host.tree import Tree
from pgtemp.images import initdb
from pgtemp.sql import admin_sql

_log = logging.getLogger("pgtemp")
NOTE = "pgtemp.json"
_NOTE_BYTES = 1 << 20


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


def write_note(directory: Path, note: Note) -> None:
    """Remember, beside data that is kept, whose it was.

    Raises:
        ClusterError: it cannot be written; the data can be opened all the same, as anybody's.
    """
    with disk_space.writing(directory / NOTE), Tree.open(directory) as tree:
        put_note(tree, note)


def put_note(tree: Tree, note: Note) -> None:
    """Write the note into an open run directory. Raises OSError."""
    tree.write(NOTE, json.dumps(asdict(note)).encode())


def try_note(directory: Path, note: Note) -> None:
    """As `write_note`, but what goes wrong is only logged: the data itself is kept."""
    try:
        write_note(directory, note)
    except ClusterError as error:
        _log.error("%s", error)


def read_note(directory: Path) -> Note:
    """Whose data it was."""
    try:
        with reach.open_tree(directory) as tree:
            said = json.loads(tree.read(NOTE, _NOTE_BYTES))
        return Note(str(said["user"]), str(said["dbname"]), dict(said.get("databases", {})))
    except (OSError, ValueError, KeyError, TypeError):
        return Note(initdb.SUPERUSER, admin_sql.MAINTENANCE)
