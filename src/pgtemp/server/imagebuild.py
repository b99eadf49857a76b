"""Building an image: initdb, then everything that makes a copy of it small and quick to start.

In a sibling directory, published by a rename at the end; what a build that was killed has left is
cleared away by the next. Called with the image's lock held.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pgtemp.errors import ClusterError, DiskFullError, OptionError
from pgtemp.host import copying, paths, processes, room
from pgtemp.host.identity import Identity
from pgtemp.server import programcopy, warden
from pgtemp.server.crash import clear_crashed
from pgtemp.server.installation import Installation

SUPERUSER = "postgres"
MANIFEST, DATA, WARM = "manifest.json", "data", "warm"
RELCACHE = "pg_internal.init"
CONTROL = "global/pg_control"
# Left out of every copy: what belongs to a running server, and the logs of an earlier one.
NEVER_COPIED = ("postmaster.pid", "postmaster.opts", "log")
_INITDB_BYTES, _INITDB_FILES = 40 << 20, 1200
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
    room.check(
        path.parent, "initdb", size=_INITDB_BYTES, files=_INITDB_FILES, remedy=room.CACHE_REMEDY
    )
    with _published(path, lock) as (building, guard):
        data = building / DATA
        owner.own(building)
        _initdb(installation, arguments, data, owner, lock, guard)
        drop_spare_wal(installation, data)
        drop_maps(data)
        _shorten(data / "postgresql.conf")
        _take_back(building, owner)
        _write_manifest(installation, building)


def copy(installation: Installation, data: Path, path: Path, lock: int) -> None:
    """Make an image of a data directory whose server was shut down, and publish it at `path`.

    Raises:
        ClusterError: the cache cannot be written.
    """
    with _published(path, lock) as (building, _):
        us = Identity(os.geteuid(), os.getegid(), "", switch=False)
        listing = copying.list_tree(data, NEVER_COPIED)
        (building / DATA).mkdir(mode=0o700)
        copying.make_dirs(building / DATA, listing.dirs, us)
        files = [one for one in listing.files if not one[0].endswith(RELCACHE)]
        copying.copy_files(data, building / DATA, files, us)
        drop_spare_wal(installation, building / DATA)
        keep_relcache(data, building / WARM)
        _write_manifest(installation, building)


def keep_relcache(data: Path, target: Path) -> None:
    """Copy a data directory's relation cache files; what is in them follows from the catalogs."""
    for file in data.glob(f"**/{RELCACHE}"):
        kept = target / file.relative_to(data)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(file.read_bytes())


@contextmanager
def _published(path: Path, lock: int) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A directory beside `path` to build in, which becomes `path` where all goes well.

    Yields it, and what is to be told of a program that works in it.
    """
    building = path.with_suffix(".building")
    shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)
    try:
        with (
            room.writing(path.parent, room.CACHE_REMEDY),
            warden.guarded([str(building)], lock, gently=True) as guard,
        ):
            building.mkdir(mode=0o700)
            yield building, guard
            building.rename(path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _initdb(
    installation: Installation,
    arguments: list[str],
    data: Path,
    owner: Identity,
    lock: int,
    guard: Callable[[int], None],
) -> None:
    initdb, copies = installation.program("initdb"), data.with_name("programs")
    if not owner.has_name:
        if paths.is_noexec(data.parent):
            raise OptionError(
                f"user {owner.name} has no name, so initdb has to be run from the cache "
                f"{data.parents[2]}, which is mounted noexec",
                remedy=f"name another directory in PGTEMP_CACHE_DIR, or {_GIVE_A_NAME}",
            )
        initdb = programcopy.for_nobody(initdb.parent, ("initdb", "postgres"), copies) / "initdb"
    argv: list[str | Path] = [initdb, "--pgdata", data, "--username", SUPERUSER]
    argv += ["--auth=trust", "--no-sync", "--no-instructions", "--no-clean", *arguments]
    # A password nobody knows: it makes room for the verifier that each copy gets.
    unknown = data.with_name("password")
    unknown.write_text(secrets.token_hex())
    owner.own(unknown)
    argv.append(f"--pwfile={unknown}")
    try:
        result = processes.run(argv, identity=owner, pass_fds=[lock], guard=guard)
    except BaseException:
        clear_crashed(str(data))
        raise
    unknown.unlink()
    shutil.rmtree(copies, ignore_errors=True)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        clear_crashed(str(data))
        remedies = [remedy for words, remedy in _REMEDIES if re.search(words, result.stderr)]
        if room.says_full(result.stderr) and not remedies:  # /dev/shm may be what is full
            where = data.parent.parent
            raise DiskFullError(
                f"{where} has too little room for initdb: {room.left(where)}",
                remedy=room.CACHE_REMEDY,
                details=lines[-8:],
            )
        raise ClusterError(
            f"initdb of PostgreSQL {installation.version} failed",
            remedy=[*remedies, "see its words below; initdb_args are passed to it as they are"][0],
            details=lines[-8:],
        )


def drop_spare_wal(installation: Installation, data: Path) -> None:
    """Keep the one WAL segment that holds the shutdown checkpoint; the others are spare."""
    needed = _controldata(installation, data, "Latest checkpoint's REDO WAL file")
    for segment in (data / "pg_wal").glob("[0-9A-F]" * 24):
        if segment.name != needed:
            segment.unlink()


def drop_maps(data: Path) -> None:
    """Remove free space and visibility maps: made anew as needed, and a quarter of the files."""
    for name in ("*_fsm", "*_vm"):
        for file in data.glob(f"**/{name}"):
            file.unlink()


def _controldata(installation: Installation, data: Path, what: str) -> str:
    """A line of what pg_controldata says."""
    result = processes.run([installation.program("pg_controldata"), data])
    match = re.search(rf"^{what}:\s+(\S+)$", result.stdout, re.M)
    if match is None:
        raise ClusterError(f"pg_controldata says no {what!r} of {data}")
    return match[1]


def _shorten(conf: Path) -> None:
    """Leave out the comments: the file is parsed at each start, and read by people."""
    lines = (line.partition("#")[0].rstrip() for line in conf.read_text().splitlines())
    conf.write_text("# from initdb\n" + "".join(f"{line}\n" for line in lines if line.strip()))


def _take_back(building: Path, owner: Identity) -> None:
    """Give the files to the caller, so that the user of the servers cannot change the image."""
    if owner.switch:
        for directory, _, files in os.walk(building):
            for name in [".", *files]:
                os.chown(os.path.join(directory, name), os.geteuid(), os.getegid())


def control_hash(data: Path) -> str:
    """The hash of the control file, which holds the state and the system's identifier."""
    try:
        return hashlib.sha256((data / CONTROL).read_bytes()).hexdigest()
    except OSError:
        return ""


def _find_verifier(data: Path, checksums: bool) -> tuple[str, int] | None:
    """Where the superuser's verifier is: in one place alone, and not under a page checksum."""
    found = [
        (str(file.relative_to(data)), match.start())
        for file in sorted((data / "global").iterdir())
        for match in _VERIFIER.finditer(file.read_bytes())
    ]
    return found[0] if len(found) == 1 and not checksums else None


def _write_manifest(installation: Installation, building: Path) -> None:
    listing = copying.list_tree(building / DATA, NEVER_COPIED)
    checksums = _controldata(installation, building / DATA, "Data page checksum version") != "0"
    manifest = {
        "dirs": listing.dirs,
        "files": listing.files,
        "control": control_hash(building / DATA),
        "password": _find_verifier(building / DATA, checksums),
    }
    (building / MANIFEST).write_text(json.dumps(manifest))
