"""Check everything that servers need on this machine, with a verdict and a remedy for each item.

The checks do not guess but try: they write files, set locales and start a server.
"""

from __future__ import annotations

import fcntl
import locale
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pgtemp.errors import PgTempError
from pgtemp.host import disk_space, identity, paths, ports, processes
from pgtemp.options.server import ServerOptions
from pgtemp.pgtempdb import PgTempDB
from pgtemp.programs import search
from pgtemp.supervisor import inventory

Verdict = Literal["ok", "warning", "failed"]
_FICLONE = 0x40049409  # linux/fs.h
_CONTRIB = "pgcrypto"  # an extension of contrib that is never packaged separately
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs")


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        name: the name of the check.
        verdict: "ok"; "warning": pgtemp works, but more slowly or with fewer features than
            possible; "failed": servers do not work.
        found: a description of the result.
        cure: the remedy; "" if none is needed.
    """

    name: str
    verdict: Verdict
    found: str
    cure: str = ""


def examine(options: ServerOptions) -> Iterator[Check]:
    """Run all checks in order, for a server with these options, and yield their results."""
    for name, check in _CHECKS.items():
        try:
            verdict, found, cure = check(options)
        except PgTempError as error:
            verdict, found, cure = "failed", "\n".join([error.cause, *error.details]), error.remedy
        except OSError as error:
            verdict, found, cure = "failed", str(error), ""
        yield Check(name, verdict, found, cure)


_Finding = tuple[Verdict, str, str]


def _programs(options: ServerOptions) -> _Finding:
    chosen = search.find(options.bin_dir, options.version)
    every = list(dict.fromkeys([chosen, *search.available()]))
    lines = [f"{one.version} in {one.bin_dir}" for one in every]
    lines[0] += " (used by default)" if len(lines) > 1 else ""
    return "ok", "\n".join(lines), ""


def _user(options: ServerOptions) -> _Finding:
    owner = identity.choose(options.run_as)
    if owner.switch:
        found = f"PostgreSQL runs as {owner.name} (uid {owner.uid}), because pgtemp runs as root"
        return "ok", found, ""
    if not owner.has_name:
        return "ok", f"PostgreSQL runs as uid {owner.uid}, which has no entry in /etc/passwd", ""
    return "ok", f"PostgreSQL runs as {owner.name} (uid {owner.uid})", ""


def _locale(_: ServerOptions) -> _Finding:
    wanted = processes.clean_environment()["LC_ALL"]
    before = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, wanted)
    except locale.Error:
        cure = "install it (on Debian: package libc-bin)"
        return "failed", f"the locale {wanted} does not exist", cure
    finally:
        locale.setlocale(locale.LC_ALL, before)
    return "ok", f"databases are created with {wanted}, encoding UTF8", ""


def _scratch(options: ServerOptions) -> _Finding:
    base = paths.scratch_base(options.data_dir_prefix, keep=False)
    kind = paths.filesystem_type(base)
    found = f"{base} ({kind}, {disk_space.free_text(base)})"
    if kind in ("tmpfs", "ramfs"):
        return "ok", found, ""
    least = paths.TMPFS_ROOM >> 20
    cure = f"give /dev/shm at least {least} MB (docker run --shm-size=1g): servers start faster"
    return "warning", f"{found}; no tmpfs with {least} MB free", cure


def _socket_path(options: ServerOptions) -> _Finding:
    base = paths.socket_base(identity.choose(options.run_as))
    return "ok", f"{base} is short enough for a unix socket", ""


def _loopback(_: ServerOptions) -> _Finding:
    addresses = ports.loopback_addresses("localhost")
    if not addresses:
        cure = "add `127.0.0.1 localhost` to /etc/hosts"
        return "failed", "localhost does not resolve to this machine", cure
    for address in addresses:
        if reason := ports.bind_error(address, 0):
            cure = "enable IPv6, or remove ::1 from /etc/hosts"
            return "warning", f"localhost also resolves to {address}, but {reason}", cure
    return "ok", "localhost resolves to " + " and ".join(addresses), ""


def _cache(_: ServerOptions) -> _Finding:
    cache = paths.cache_dir()
    images = sorted((cache / "images").glob("*/manifest.json"))
    with inventory.opened(cache.resolve()) as directory:
        size = disk_space.size_of(directory) >> 20
    kind = paths.filesystem_type(cache)
    found = f"{cache} ({kind}, {disk_space.free_text(cache)}), "
    found += f"{len(images)} images, {size} MB including programs"
    if kind in _NETWORK:
        cure = "set PGTEMP_CACHE_DIR to a directory on a local disk"
        return "warning", f"{found}; locks on {kind} are not reliable", cure
    return "ok", found, ""


def _reflink(options: ServerOptions) -> _Finding:
    if sys.platform != "linux":
        return "ok", "not checked on this system", ""
    base = paths.scratch_base(options.data_dir_prefix, keep=False)
    with tempfile.TemporaryFile(dir=base) as one, tempfile.TemporaryFile(dir=base) as other:
        one.write(bytes(4096))
        one.flush()
        try:
            fcntl.ioctl(other, _FICLONE, one.fileno())
        except OSError:
            return "ok", f"{paths.filesystem_type(base)} does not support it; files are copied", ""
    return "ok", f"{paths.filesystem_type(base)} supports it; pgtemp copies files anyway", ""


def _supervision(_: ServerOptions) -> _Finding:
    if not os.path.exists("/proc/self/stat"):
        cure = "mount /proc" if sys.platform == "linux" else ""
        return "warning", "no /proc: the processes of a killed server cannot be found", cure
    if not hasattr(os, "pidfd_open"):
        found = "this Python has no pidfd_open: a forked child may delay the stop of servers"
        return "warning", found, ""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        found = f"pidfd_open: {error.strerror}; a forked child may delay the stop of servers"
        return "warning", found, "allow pidfd_open in the container's seccomp profile"
    return "ok", "/proc and pidfd are available: a killed process leaves nothing behind", ""


def _leftovers(_: ServerOptions) -> _Finding:
    left = [one for one in inventory.run_directories() if not one.lives and one.is_ours]
    if not left:
        return "ok", "none", ""
    size = sum(one.size for one in left) >> 20
    found = f"{len(left)} directories of owners that have exited, {size} MB"
    return "warning", found, "run pgtemp sweep (the next start of a server also removes them)"


def _server(options: ServerOptions) -> _Finding:
    with PgTempDB.with_options(options):
        pass  # not measured, because the first start may run initdb
    start = time.perf_counter()
    with PgTempDB.with_options(options) as db, db.connect() as connection:
        connection.execute("SELECT 1")
        milliseconds = (time.perf_counter() - start) * 1000
        row = connection.execute("SHOW server_encoding").fetchone()
        encoding = row[0] if row is not None else ""
        return "ok", f"returned its first row after {milliseconds:.0f} ms; {encoding}", ""


def _extensions(options: ServerOptions) -> _Finding:
    with PgTempDB.with_options(options) as db, db.connect() as connection:
        rows = connection.execute("SELECT name FROM pg_available_extensions ORDER BY 1").fetchall()
        major = db.installation.major
    names = [str(name) for (name,) in rows]
    if _CONTRIB not in names:
        cure = f"install postgresql-contrib for {major}, or use another PostgreSQL"
        return "warning", f"only {', '.join(names)}: this PostgreSQL lacks contrib", cure
    return "ok", f"{len(names)} for PostgreSQL {major}: {', '.join(names)}", ""


_CHECKS: dict[str, Callable[[ServerOptions], _Finding]] = {
    "programs": _programs,
    "user": _user,
    "locale": _locale,
    "data": _scratch,
    "socket": _socket_path,
    "localhost": _loopback,
    "cache": _cache,
    "reflink": _reflink,
    "supervision": _supervision,
    "leftovers": _leftovers,
    "server": _server,
    "extensions": _extensions,
}
