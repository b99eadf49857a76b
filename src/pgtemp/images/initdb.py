"""Build an image with initdb."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from pgtemp.errors import ClusterError, DiskFullError, OptionError
from pgtemp.host import disk_space, paths, processes
from pgtemp.host.identity import Identity
from pgtemp.host.tree import Tree
from pgtemp.images import publish
from pgtemp.images.source import CONF
from pgtemp.programs import nameless_user
from pgtemp.programs.installation import Installation
from pgtemp.supervisor.crash import clear_crashed
from pgtemp.supervisor.leftovers import DATA

SUPERUSER = "postgres"
_INITDB, _PASSWORD = "initdb", "password"
_INITDB_SECONDS = 300.0
_INITDB_BYTES, _INITDB_FILES = 40 << 20, 1200
_CONF_BYTES = 1 << 20
_NAME_REMEDY = (
    "add the user to /etc/passwd, or use nss_wrapper (LD_PRELOAD=libnss_wrapper.so, "
    "NSS_WRAPPER_PASSWD, NSS_WRAPPER_GROUP)"
)
_REMEDIES = (
    (r"could not look up effective user ID", _NAME_REMEDY),
    (r"could not resize shared memory segment", "make /dev/shm larger (docker run --shm-size)"),
    (r"File too large", "raise the file size limit (ulimit -f)"),
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
        # getopt_long accepts abbreviations, so prefixes of fixed options are also refused.
        if not re.fullmatch(r"[a-z][a-z-]+", name) or any(o.startswith(name) for o in _FIXED):
            raise OptionError(
                f"initdb_args: {name!r} is not allowed",
                remedy="specify a long option of initdb other than " + ", ".join(sorted(_FIXED)),
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
            f"user {owner.name}, which PostgreSQL runs as, cannot enter {blocked}, "
            "which contains the cache",
            remedy="set PGTEMP_CACHE_DIR to another directory",
        )
    # Check this before initdb runs: if the disk is full, the server that it starts leaves kernel
    # objects behind.
    cure = disk_space.CACHE_REMEDY
    disk_space.check(path.parent, "initdb", size=_INITDB_BYTES, files=_INITDB_FILES, remedy=cure)
    with publish.building_at(path, lock, [_INITDB]) as (building, guard):
        # The files are copied, because the server user may still have one of them open for writing.
        building.make_directory(_INITDB, publish.OTHERS_MAY_ENTER if owner.switch else 0o700)
        with building.below(_INITDB) as work:
            _initdb(installation, arguments, work, owner, guard)
            with Tree.open(Path(work.path, DATA)) as data:
                conf = data.read(CONF, _CONF_BYTES).decode(errors="surrogateescape")
            conf = _without_comments(conf)
            publish.copy(publish.shut_down(Path(work.path), installation, owner, conf), building)
        building.remove(_INITDB)


def _initdb(
    installation: Installation,
    arguments: list[str],
    work: Tree,
    owner: Identity,
    guard: Callable[[int], None],
) -> None:
    """Run initdb on `data` in a directory of the caller; only `data` belongs to the server user."""
    initdb, data = installation.program("initdb"), Path(work.path, DATA)
    if not owner.has_name:
        if paths.is_noexec(data.parent):
            raise OptionError(
                f"user {owner.name} has no name, so initdb has to be run from the cache "
                f"{data.parents[3]}, which is mounted noexec",
                remedy=f"set PGTEMP_CACHE_DIR to another directory, or {_NAME_REMEDY}",
            )
        copies, names = data.with_name("programs"), ("initdb", "postgres")
        initdb = nameless_user.copy_without_lookup(initdb.parent, names, copies) / "initdb"
    argv: list[str | Path] = [initdb, "--pgdata", data, "--username", SUPERUSER]
    argv += ["--auth=trust", "--no-sync", "--no-instructions", "--no-clean", *arguments]
    # A random password: its verifier reserves space for the verifier that each copy gets.
    with Tree(os.dup(work.fd), work.path, owner.uid, owner.gid if owner.switch else None) as tree:
        tree.write(_PASSWORD, secrets.token_hex().encode())
        tree.make_directory(DATA)
        tree.hand_over(DATA)
    argv.append(f"--pwfile={data.with_name(_PASSWORD)}")
    with ExitStack() as failed:
        failed.callback(clear_crashed, str(data))
        try:
            result = processes.run(argv, identity=owner, guard=guard, seconds=_INITDB_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ClusterError(
                f"initdb of PostgreSQL {installation.version} did not finish within "
                f"{_INITDB_SECONDS:g} s",
                remedy="find the reason why its processes are stopped, or why the disk is slow",
            ) from error
        if result.returncode != 0:
            raise _failure(installation, result.stderr, data.parents[2])
        failed.pop_all()


def _failure(installation: Installation, output: str, cache: Path) -> ClusterError:
    """The error for an initdb that failed, from its output."""
    lines = [line for line in output.splitlines() if line.strip()][-8:]
    remedies = [remedy for words, remedy in _REMEDIES if re.search(words, output)]
    if disk_space.says_full(output) and not remedies:  # else /dev/shm may be full
        return DiskFullError(
            f"{cache} has too little free space for initdb: {disk_space.free_text(cache)}",
            remedy=disk_space.CACHE_REMEDY,
            details=lines,
        )
    return ClusterError(
        f"initdb of PostgreSQL {installation.version} failed",
        remedy=[*remedies, "its output follows; initdb_args are passed to it unchanged"][0],
        details=lines,
    )


def _without_comments(conf: str) -> str:
    """Remove the comments, because the file is parsed at each start and shown to users."""
    lines = (line.partition("#")[0].rstrip() for line in conf.splitlines())
    return "# from initdb\n" + "".join(f"{line}\n" for line in lines if line.strip())
