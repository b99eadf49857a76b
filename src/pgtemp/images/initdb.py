"""Building an image: initdb, then everything that makes a copy of it small and quick to start.

In a sibling directory, published by a rename at the end; what a build that was killed has left is
cleared away by the next. Called with the image's lock held.
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
# Of the caller's directory in which another user has one: that user may pass.
_ENTERED = 0o711
_MAPS = ("_fsm", "_vm")
_SEGMENT = re.compile(r"pg_wal/[0-9A-F]{24}")
_REDO_SEGMENT, _CHECKSUMS = "Latest checkpoint's REDO WAL file", "Data page checksum version"
_CONTROLDATA_SECONDS = 30.0
_CONF_BYTES = 1 << 20
# Limits of the search for the verifier; `global` has some 60 files of 8 to 100 kB.
_GLOBAL_BYTES, _GLOBAL_FILES = 1 << 20, 200
_INITDB_BYTES, _INITDB_FILES = 40 << 20, 1200
_RELATION = re.compile("[0-9]+")
_VERIFIER = re.compile(rb"SCRAM-SHA-256\$\d{4}:[\w+/=]{24}\$[\w+/=]{44}:[\w+/=]{44}")
_GIVE_A_NAME = (
    "give the user a line in /etc/passwd, or a name by nss_wrapper (LD_PRELOAD=libnss_wrapper.so, "
    "NSS_WRAPPER_PASSWD, NSS_WRAPPER_GROUP)"
)
_REMEDIES = (
    (r"could not look up effective user ID", _GIVE_A_NAME),
    (r"could not resize shared memory segment", "make /dev/shm larger (docker run --shm-size)"),
    (r"File too large", "raise the limit on the size of files (ulimit -f)"),
)
_OURS = {"pgdata", "username", "auth", "auth-local", "auth-host", "pwfile", "pwprompt", "waldir"}


def arguments(installation: Installation, given: Mapping[str, str]) -> list[str]:
    """initdb's arguments: ours, and the user's over them. Raises OptionError."""
    locale = "C.UTF-8" if sys.platform == "linux" else "en_US.UTF-8"
    chosen = {"encoding": "UTF8", "locale": locale, "wal-segsize": "1"}
    if installation.major >= 16:  # a /dev/shm of 1 MB is too small for initdb otherwise
        chosen["set"] = "dynamic_shared_memory_type=mmap"
    if installation.major >= 18:
        chosen["no-data-checksums"] = ""
    for name, value in given.items():
        name = name.lstrip("-").replace("_", "-")
        # getopt takes abbreviations too, so a beginning of one of ours is one of ours.
        if not re.fullmatch(r"[a-z][a-z-]+", name) or any(o.startswith(name) for o in _OURS):
            raise OptionError(
                f"initdb_args: {name!r} cannot be given",
                remedy="give a long option of initdb other than " + ", ".join(sorted(_OURS)),
            )
        if name == "data-checksums":
            chosen.pop("no-data-checksums", None)
        chosen[name] = value
    return [f"--{name}={value}" if value else f"--{name}" for name, value in chosen.items()]


def build(
    installation: Installation, arguments: list[str], path: Path, owner: Identity, lock: int
) -> None:
    """Make an image with initdb, and publish it at `path`. Raises PgTempError."""
    if blocked := owner.blocked_at(path.parent):
        raise OptionError(
            f"user {owner.name}, as whom PostgreSQL runs, cannot enter {blocked}, "
            "where the cache is",
            remedy="name another directory in PGTEMP_CACHE_DIR",
        )
    # Not left to initdb: where its server ends over a full disk, kernel objects stay behind.
    disk_space.check(
        path.parent,
        "initdb",
        size=_INITDB_BYTES,
        files=_INITDB_FILES,
        remedy=disk_space.CACHE_REMEDY,
    )
    with _published(path, lock) as (building, guard):
        # What initdb makes is copied: its user may still have a file open there for writing.
        building.make_directory(_INITDB, _ENTERED if owner.switch else 0o700)
        with building.below(_INITDB) as work:
            _initdb(installation, arguments, work, owner, lock, guard)
            with Tree.open(Path(work.path, DATA)) as data:
                conf = data.read(CONF, _CONF_BYTES).decode(errors="surrogateescape")
            made = shut_down(
                path=Path(work.path), installation=installation, owner=owner, conf=_shortened(conf)
            )
            _copy(made, building)
        building.remove(_INITDB)


def publish(made: Image, path: Path, lock: int) -> None:
    """Publish an image at `path`, for other processes too.

    Raises:
        ClusterError: the cache cannot be written.
    """
    with _published(path, lock) as (building, _):
        _copy(made, building)


def shut_down(path: Path, installation: Installation, owner: Identity, conf: str) -> Image:
    """An image that is nobody else's: a directory whose server was shut down cleanly.

    Left out are the WAL segments that are spare, and the free space and visibility maps, which are
    made again as needed and are a quarter of the files. What is in a tablespace is copied into it.

    Args:
        path: has the data directory; the image lasts as long as it.
        owner: the user of the data directory.
        conf: the text for postgresql.conf.

    Raises:
        ClusterError: the directory holds something that is not copied.
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
    """Copy an image, with its relation cache files, to a directory that becomes one."""
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
        with Tree.open(made.path / WARM) as kept:
            listing = file_copy.list_tree(kept)
            building.make_directory(WARM)
            with building.below(WARM) as warm:
                for name in listing.dirs:
                    warm.make_directory(name)
                file_copy.copy_files(kept, warm, listing.files)
    manifest = {
        "dirs": made.dirs,
        "files": files,
        "control": made.control,
        "password": made.password,
    }
    building.write(MANIFEST, json.dumps(manifest).encode())


@contextmanager
def _published(path: Path, lock: int) -> Iterator[tuple[Tree, Callable[[int], None]]]:
    """A directory beside `path` to build in, which becomes `path` where all goes well.

    Yields it, and what is to be told of a program that works in it.
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
                    os.fchmod(tree.fd, 0o700)  # no other user has to pass any more
                images.rename(building.name, path.name)
        except BaseException:
            images.remove(building.name)
            raise


def _initdb(
    installation: Installation,
    arguments: list[str],
    work: Tree,
    owner: Identity,
    lock: int,
    guard: Callable[[int], None],
) -> None:
    """Run initdb on `data` in a directory of the caller's, where only `data` is its user's."""
    initdb, data = installation.program("initdb"), Path(work.path, DATA)
    if not owner.has_name:
        if paths.is_noexec(data.parent):
            raise OptionError(
                f"user {owner.name} has no name, so initdb has to be run from the cache "
                f"{data.parents[3]}, which is mounted noexec",
                remedy=f"name another directory in PGTEMP_CACHE_DIR, or {_GIVE_A_NAME}",
            )
        copies = data.with_name("programs")
        initdb = nameless_user.for_nobody(initdb.parent, ("initdb", "postgres"), copies) / "initdb"
    argv: list[str | Path] = [initdb, "--pgdata", data, "--username", SUPERUSER]
    argv += ["--auth=trust", "--no-sync", "--no-instructions", "--no-clean", *arguments]
    # A password nobody knows: it makes room for the verifier that each copy gets.
    with Tree(os.dup(work.fd), work.path, owner.uid, owner.gid if owner.switch else None) as theirs:
        theirs.write(_PASSWORD, secrets.token_hex().encode())
        theirs.make_directory(DATA)
        theirs.hand_over(DATA)
    argv.append(f"--pwfile={data.with_name(_PASSWORD)}")
    try:
        result = processes.run(argv, identity=owner, pass_fds=[lock], guard=guard)
    except BaseException:
        clear_crashed(str(data))
        raise
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        clear_crashed(str(data))
        remedies = [remedy for words, remedy in _REMEDIES if re.search(words, result.stderr)]
        if disk_space.says_full(result.stderr) and not remedies:  # /dev/shm may be what is full
            where = data.parents[2]
            raise DiskFullError(
                f"{where} has too little room for initdb: {disk_space.left(where)}",
                remedy=disk_space.CACHE_REMEDY,
                details=lines[-8:],
            )
        raise ClusterError(
            f"initdb of PostgreSQL {installation.version} failed",
            remedy=[*remedies, "see its words below; initdb_args are passed to it as they are"][0],
            details=lines[-8:],
        )


def _controldata(installation: Installation, data: Path, owner: Identity) -> dict[str, str]:
    """What pg_controldata, run as the user of the data directory, says of it."""
    program = installation.program("pg_controldata")
    try:
        result = processes.run([program, data], identity=owner, seconds=_CONTROLDATA_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"pg_controldata did not finish with {data}") from error
    said = dict(re.findall(r"^([^:]+):\s+(\S.*)$", result.stdout, re.M))
    if missing := {_REDO_SEGMENT, _CHECKSUMS} - said.keys():
        raise ClusterError(
            f"pg_controldata says no {min(missing)!r} of {data}",
            remedy="see its words below",
            details=result.stderr.splitlines()[-3:],
        )
    return said


def _shortened(conf: str) -> str:
    """Leave out the comments: the file is parsed at each start, and read by people."""
    lines = (line.partition("#")[0].rstrip() for line in conf.splitlines())
    return "# from initdb\n" + "".join(f"{line}\n" for line in lines if line.strip())


def _find_verifier(data: Tree) -> tuple[str, int] | None:
    """Where the superuser's verifier is, if it is in one place alone."""
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
