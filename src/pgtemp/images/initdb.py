"""Build an image: run initdb, then apply everything that makes its copies small and quick to start.

The image is built in a sibling directory and published by a rename at the end. A build removes what
a killed build of the same image has left. The caller holds the image's lock.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pgtemp.errors import ClusterError, DiskFullError, OptionError
from pgtemp.host import disk_space, file_copy, paths, processes
from pgtemp.host.file_copy import Listing
from pgtemp.host.identity import Identity
from pgtemp.host.tree import Tree
from pgtemp.images.image import CONF, NEVER_COPIED, WARM, Image, control_hash, divided
from pgtemp.programs import nameless_user
from pgtemp.programs.installation import Installation
from pgtemp.supervisor import supervision
from pgtemp.supervisor.crash import clear_crashed
from pgtemp.supervisor.leftovers import DATA

SUPERUSER = "postgres"
MANIFEST = "manifest.json"
_INITDB, _PASSWORD = "initdb", "password"
# Mode of a directory of the caller that contains a directory of the server user, who must enter it.
_ENTERED = 0o711
_MAPS = ("_fsm", "_vm")
_SEGMENT = re.compile(r"pg_wal/[0-9A-F]{24}")
_REDO_SEGMENT, _CHECKSUMS = "Latest checkpoint's REDO WAL file", "Data page checksum version"
_CONTROLDATA_SECONDS, _INITDB_SECONDS = 30.0, 300.0
_CONF_BYTES = 1 << 20
# Limits of the search for the verifier; `global` has about 60 files of 8 to 100 kB.
_GLOBAL_BYTES, _GLOBAL_FILES = 1 << 20, 200
_INITDB_BYTES, _INITDB_FILES = 40 << 20, 1200
_RELATION = re.compile("[0-9]+")
_VERIFIER = re.compile(rb"SCRAM-SHA-256\$\d{4}:[\w+/=]{24}\$[\w+/=]{44}:[\w+/=]{44}")
_NAME_REMEDY = (
    "give the user a line in /etc/passwd, or a name by nss_wrapper (LD_PRELOAD=libnss_wrapper.so, "
    "NSS_WRAPPER_PASSWD, NSS_WRAPPER_GROUP)"
)
_REMEDIES = (
    (r"could not look up effective user ID", _NAME_REMEDY),
    (r"could not resize shared memory segment", "make /dev/shm larger (docker run --shm-size)"),
    (r"File too large", "raise the limit on the size of files (ulimit -f)"),
)
_FIXED = {"pgdata", "username", "auth", "auth-local", "auth-host", "pwfile", "pwprompt", "waldir"}


def arguments(installation: Installation, given: Mapping[str, str]) -> list[str]:
    """initdb's arguments: pgtemp's defaults, overridden by the user's. Raises OptionError."""
    locale = "C.UTF-8" if sys.platform == "linux" else "en_US.UTF-8"
    chosen = {"encoding": "UTF8", "locale": locale, "wal-segsize": "1"}
    if installation.major >= 16:  # otherwise a /dev/shm of 1 MB is too small for initdb
        chosen["set"] = "dynamic_shared_memory_type=mmap"
    if installation.major >= 18:
        chosen["no-data-checksums"] = ""
    for name, value in given.items():
        name = name.lstrip("-").replace("_", "-")
        # getopt_long accepts abbreviations, so a prefix of a fixed option is refused too.
        if not re.fullmatch(r"[a-z][a-z-]+", name) or any(o.startswith(name) for o in _FIXED):
            raise OptionError(
                f"initdb_args: {name!r} cannot be given",
                remedy="give a long option of initdb other than " + ", ".join(sorted(_FIXED)),
            )
        if name == "data-checksums":
            chosen.pop("no-data-checksums", None)
        chosen[name] = value
    return [f"--{name}={value}" if value else f"--{name}" for name, value in chosen.items()]


def build(
    installation: Installation, arguments: list[str], path: Path, owner: Identity, lock: int
) -> None:
    """Build an image with initdb, and publish it at `path`. Raises PgTempError."""
    if blocked := owner.blocked_at(path.parent):
        raise OptionError(
            f"user {owner.name}, as whom PostgreSQL runs, cannot enter {blocked}, "
            "which contains the cache",
            remedy="name another directory in PGTEMP_CACHE_DIR",
        )
    # Checked before initdb runs: a server that it starts leaves kernel objects if the disk is full.
    disk_space.check(
        path.parent,
        "initdb",
        size=_INITDB_BYTES,
        files=_INITDB_FILES,
        remedy=disk_space.CACHE_REMEDY,
    )
    with _published(path, lock) as (building, guard):
        # The files are copied, because the server user may still have one of them open for writing.
        building.make_directory(_INITDB, _ENTERED if owner.switch else 0o700)
        with building.below(_INITDB) as work:
            _initdb(installation, arguments, work, owner, guard)
            with Tree.open(Path(work.path, DATA)) as data:
                conf = data.read(CONF, _CONF_BYTES).decode(errors="surrogateescape")
            made = shut_down(
                path=Path(work.path), installation=installation, owner=owner, conf=_shortened(conf)
            )
            _copy(made, building)
        building.remove(_INITDB)


def publish(made: Image, path: Path, lock: int) -> None:
    """Copy an image to `path` in the cache, where other processes can use it too.

    Raises:
        ClusterError: the cache cannot be written.
    """
    with _published(path, lock) as (building, _):
        _copy(made, building)


def shut_down(path: Path, installation: Installation, owner: Identity, conf: str) -> Image:
    """A private image: a run directory whose server was shut down cleanly.

    Spare WAL segments are left out, as are the free space and visibility maps: PostgreSQL recreates
    the maps as needed, and they are a quarter of the files. The files of tablespaces are included.

    Args:
        path: the directory that contains the data directory; the image lasts as long as it exists.
        owner: the user of the data directory.
        conf: the text for postgresql.conf.

    Raises:
        ClusterError: the directory contains a file that cannot be copied.
    """
    state = _controldata(installation, path / DATA, owner)
    needed = f"pg_wal/{state[_REDO_SEGMENT]}"
    with Tree.open(path / DATA) as data:
        listing = file_copy.list_tree(data, (*NEVER_COPIED, CONF))
        files = tuple(
            (name, size)
            for name, size in listing.files
            if not name.endswith(_MAPS) and (name == needed or not _SEGMENT.fullmatch(name))
        )
        password = _find_verifier(data) if state[_CHECKSUMS] == "0" else None
        return divided(
            path, Listing(listing.dirs, files), control_hash(data), conf=conf, password=password
        )


def _copy(made: Image, building: Tree) -> None:
    """Copy an image, with its relation cache files, to a directory that becomes an image."""
    building.make_directory(DATA)
    with building.below(DATA) as data:
        with Tree.open(made.path / DATA) as source:
            for name in made.dirs:
                data.make_directory(name)
            file_copy.copy_files(source, data, made.files)
        assert made.conf is not None
        data.write(CONF, made.conf.encode(errors="surrogateescape"))
        files = (*made.files, (CONF, os.stat(CONF, dir_fd=data.fd).st_size))
    if made.relcache:
        with Tree.open(made.path / WARM) as saved:
            listing = file_copy.list_tree(saved)
            building.make_directory(WARM)
            with building.below(WARM) as warm:
                for name in listing.dirs:
                    warm.make_directory(name)
                file_copy.copy_files(saved, warm, listing.files)
    manifest = {
        "dirs": made.dirs,
        "files": files,
        "control": made.control,
        "password": made.password,
    }
    building.write(MANIFEST, json.dumps(manifest).encode())


@contextmanager
def _published(path: Path, lock: int) -> Iterator[tuple[Tree, Callable[[int], None]]]:
    """A sibling directory of `path` to build in, which is renamed to `path` if the block succeeds.

    Yields the directory, and the function to call with the pid of a program that works in it.
    """
    building = path.with_suffix(".building")
    with disk_space.writing(path.parent, disk_space.CACHE_REMEDY), Tree.open(path.parent) as images:
        images.remove(building.name)
        images.remove(path.name)
        try:
            with supervision.guarded(
                [str(building / _INITDB), str(building)], lock, gently=True
            ) as guard:
                images.make_directory(building.name, _ENTERED if os.geteuid() == 0 else 0o700)
                with images.below(building.name) as tree:
                    yield tree, guard
                    os.fchmod(tree.fd, 0o700)  # no other user needs to enter it any more
                images.rename(building.name, path.name)
        except BaseException:
            images.remove(building.name)
            raise


def _initdb(
    installation: Installation,
    arguments: list[str],
    work: Tree,
    owner: Identity,
    guard: Callable[[int], None],
) -> None:
    """Run initdb on `data` in a directory of the caller; only `data` is the server user's."""
    initdb, data = installation.program("initdb"), Path(work.path, DATA)
    if not owner.has_name:
        if paths.is_noexec(data.parent):
            raise OptionError(
                f"user {owner.name} has no name, so initdb has to be run from the cache "
                f"{data.parents[3]}, which is mounted noexec",
                remedy=f"name another directory in PGTEMP_CACHE_DIR, or {_NAME_REMEDY}",
            )
        copies = data.with_name("programs")
        initdb = (
            nameless_user.copy_without_lookup(initdb.parent, ("initdb", "postgres"), copies)
            / "initdb"
        )
    argv: list[str | Path] = [initdb, "--pgdata", data, "--username", SUPERUSER]
    argv += ["--auth=trust", "--no-sync", "--no-instructions", "--no-clean", *arguments]
    # A random password: its verifier reserves the space for the one that each copy gets.
    with Tree(os.dup(work.fd), work.path, owner.uid, owner.gid if owner.switch else None) as tree:
        tree.write(_PASSWORD, secrets.token_hex().encode())
        tree.make_directory(DATA)
        tree.hand_over(DATA)
    argv.append(f"--pwfile={data.with_name(_PASSWORD)}")
    try:
        result = processes.run(argv, identity=owner, guard=guard, seconds=_INITDB_SECONDS)
    except subprocess.TimeoutExpired as error:
        clear_crashed(str(data))
        raise ClusterError(
            f"initdb of PostgreSQL {installation.version} did not end within {_INITDB_SECONDS:g} s",
            remedy="look for what stops its processes, or slows the disk down",
        ) from error
    except BaseException:
        clear_crashed(str(data))
        raise
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        clear_crashed(str(data))
        remedies = [remedy for words, remedy in _REMEDIES if re.search(words, result.stderr)]
        if disk_space.says_full(result.stderr) and not remedies:  # else /dev/shm may be full
            where = data.parents[2]
            raise DiskFullError(
                f"{where} has too little free space for initdb: {disk_space.left(where)}",
                remedy=disk_space.CACHE_REMEDY,
                details=lines[-8:],
            )
        raise ClusterError(
            f"initdb of PostgreSQL {installation.version} failed",
            remedy=[*remedies, "its output follows; initdb_args are passed to it unchanged"][0],
            details=lines[-8:],
        )


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


def _shortened(conf: str) -> str:
    """Remove the comments, because the file is parsed at each start and shown to users."""
    lines = (line.partition("#")[0].rstrip() for line in conf.splitlines())
    return "# from initdb\n" + "".join(f"{line}\n" for line in lines if line.strip())


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
