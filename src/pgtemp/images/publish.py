"""Publish an image: choose the files of a data directory that was shut down, and copy them.

The image is created in a sibling directory and finally published by a rename. A build removes the
files that a killed build of the same image left behind. The caller holds the image's lock.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pgtemp.errors import ClusterError
from pgtemp.host import disk_space, file_copy, processes
from pgtemp.host.file_copy import Listing
from pgtemp.host.identity import Identity
from pgtemp.host.tree import Tree
from pgtemp.images.image import RELCACHE, WARM, Image
from pgtemp.images.source import CONF, NEVER_COPIED, control_hash
from pgtemp.programs.installation import Installation
from pgtemp.supervisor import supervision
from pgtemp.supervisor.leftovers import DATA

MANIFEST = "manifest.json"
# The mode of a directory of the caller that contains a directory of the server user, who must be
# able to enter it.
OTHERS_MAY_ENTER = 0o711
_LEFT_OUT = ("_fsm", "_vm", RELCACHE)
_SEGMENT = re.compile(r"pg_wal/[0-9A-F]{24}")
_REDO_SEGMENT, _CHECKSUMS = "Latest checkpoint's REDO WAL file", "Data page checksum version"
_CONTROLDATA_SECONDS = 30.0
# Limits of the search for the verifier; `global` has about 60 files of 8 to 100 kB.
_GLOBAL_BYTES, _GLOBAL_FILES = 1 << 20, 200
_RELATION = re.compile("[0-9]+")
_VERIFIER = re.compile(rb"SCRAM-SHA-256\$\d{4}:[\w+/=]{24}\$[\w+/=]{44}:[\w+/=]{44}")


def publish(made: Image, path: Path, lock: int) -> None:
    """Copy an image to `path` in the cache, for use by all processes. Raises ClusterError."""
    with building_at(path, lock, ()) as (building, _):
        copy(made, building)


def shut_down(path: Path, installation: Installation, owner: Identity, conf: str) -> Image:
    """A private image: a run directory whose server was shut down cleanly.

    Spare WAL segments are omitted, and so are the free space and visibility maps: PostgreSQL
    recreates the maps as needed, and they are a quarter of the files. The files of tablespaces are
    included.

    Args:
        path: the directory that contains the data directory; the image lasts as long as it exists.
        owner: the user of the data directory.
        conf: the text for postgresql.conf.

    Raises ClusterError if the directory contains a file that cannot be copied.
    """
    state = _controldata(installation, path / DATA, owner)
    needed = f"pg_wal/{state[_REDO_SEGMENT]}"
    with Tree.open(path / DATA) as data:
        listing = file_copy.list_tree(data, (*NEVER_COPIED, CONF))
        files = tuple(
            (name, size)
            for name, size in listing.files
            if not name.endswith(_LEFT_OUT) and (name == needed or not _SEGMENT.fullmatch(name))
        )
        password = _find_verifier(data) if state[_CHECKSUMS] == "0" else None
        return Image(path, listing.dirs, files, control_hash(data), conf, password)


def copy(made: Image, building: Tree) -> None:
    """Copy an image, with its relation cache files, to a directory that becomes an image."""
    building.make_directory(DATA)
    with building.below(DATA) as data:
        with Tree.open(made.path / DATA) as source:
            file_copy.copy_listing(source, data, Listing(made.dirs, made.files))
        assert made.conf is not None
        data.write(CONF, made.conf.encode(errors="surrogateescape"))
        files = (*made.files, (CONF, os.stat(CONF, dir_fd=data.fd).st_size))
    if made.relcache:
        with Tree.open(made.path / WARM) as saved:
            building.make_directory(WARM)
            with building.below(WARM) as warm:
                file_copy.copy_listing(saved, warm, file_copy.list_tree(saved))
    manifest = {
        "dirs": made.dirs,
        "files": files,
        "control": made.control,
        "password": made.password,
    }
    building.write(MANIFEST, json.dumps(manifest).encode())


@contextmanager
def building_at(
    path: Path, lock: int, inner: Sequence[str]
) -> Iterator[tuple[Tree, Callable[[int], None]]]:
    """A sibling directory of `path` to build in, which is renamed to `path` if the block succeeds.

    Yields the directory, and the function to call with the pid of a program that works in it.

    Args:
        inner: directories in it in which such a program works; they are removed first.
    """
    building = path.with_suffix(".building")
    with disk_space.writing(path.parent, disk_space.CACHE_REMEDY), Tree.open(path.parent) as images:
        images.remove(building.name)
        images.remove(path.name)
        try:
            remove = [*(str(building / name) for name in inner), str(building)]
            with supervision.guarded(remove, lock, gently=True) as guard:
                mode = OTHERS_MAY_ENTER if os.geteuid() == 0 else 0o700
                images.make_directory(building.name, mode)
                with images.below(building.name) as tree:
                    yield tree, guard
                    os.fchmod(tree.fd, 0o700)  # other users no longer need to enter it
                images.rename(building.name, path.name)
        except BaseException:
            images.remove(building.name)
            raise


def _controldata(installation: Installation, data: Path, owner: Identity) -> dict[str, str]:
    """The output of pg_controldata for a data directory, run as the directory's user."""
    program = installation.program("pg_controldata")
    try:
        result = processes.run([program, data], identity=owner, seconds=_CONTROLDATA_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"pg_controldata did not finish with {data}") from error
    values = dict(re.findall(r"^([^:]+):\s+(\S.*)$", result.stdout, re.M))
    if missing := {_REDO_SEGMENT, _CHECKSUMS} - values.keys():
        raise ClusterError(
            f"pg_controldata printed no {min(missing)!r} for {data}",
            remedy="its output follows",
            details=result.stderr.splitlines()[-3:],
        )
    return values


def _find_verifier(data: Tree) -> tuple[str, int] | None:
    """The file and offset of the superuser's verifier; None unless there is exactly one match."""
    relations = (
        f"global/{last}"
        for last, status in data.entries("global")
        if _RELATION.fullmatch(last)
        and stat.S_ISREG(status.st_mode)
        and status.st_size < _GLOBAL_BYTES
    )
    found = [
        (name, match.start())
        for name in itertools.islice(relations, _GLOBAL_FILES)
        for match in _VERIFIER.finditer(data.read(name, _GLOBAL_BYTES))
    ]
    return found[0] if len(found) == 1 else None
