"""What this machine has for pgtemp, and what is in its way: each with a verdict and a cure.

Everything is tried rather than guessed: files are written, locales set, a server is started.
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
from pgtemp.programs import installation
from pgtemp.supervisor import inventory

Verdict = Literal["ok", "warning", "failed"]
_FICLONE = 0x40049409  # linux/fs.h
_CONTRIB = "pgcrypto"  # one that is never packaged alone
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        verdict: "warning" is slower or less than it could be; "failed" is that nothing works.
        found: what there is.
        cure: what to do about it; "" where nothing is to be done.
    """

    name: str
    verdict: Verdict
    found: str
    cure: str = ""


def examine(options: ServerOptions) -> Iterator[Check]:
    """Look at everything, one after the other, as a server with these options would find it."""
    for name, look in _CHECKS.items():
        try:
            verdict, found, cure = look(options)
        except PgTempError as error:
            verdict, found, cure = "failed", "\n".join([error.cause, *error.details]), error.remedy
        except OSError as error:
            verdict, found, cure = "failed", str(error), ""
        yield Check(name, verdict, found, cure)


_Finding = tuple[Verdict, str, str]


def _programs(options: ServerOptions) -> _Finding:
    chosen = installation.find(options.bin_dir, options.version)
    every = list(dict.fromkeys([chosen, *installation.available()]))
    lines = [f"{one.version} in {one.bin_dir}" for one in every]
    lines[0] += " (taken where no other is asked for)" if len(lines) > 1 else ""
    return "ok", "\n".join(lines), ""


def _user(options: ServerOptions) -> _Finding:
    owner = identity.choose(options.run_as)
    if owner.switch:
        return "ok", f"PostgreSQL runs as {owner.name} (uid {owner.uid}), since this is root", ""
    if not owner.has_name:
        return "ok", f"PostgreSQL runs as uid {owner.uid}, which has no line in /etc/passwd", ""
    return "ok", f"PostgreSQL runs as {owner.name} (uid {owner.uid})", ""


def _locale(_: ServerOptions) -> _Finding:
    wanted = processes.clean_environment()["LC_ALL"]
    before = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, wanted)
    except locale.Error:
        return "failed", f"there is no locale {wanted}", "install it (on Debian: libc-bin has it)"
    finally:
        locale.setlocale(locale.LC_ALL, before)
    return "ok", f"databases are made with {wanted}, encoding UTF8", ""


def _scratch(options: ServerOptions) -> _Finding:
    base = paths.scratch_base(options.data_dir_prefix, keep=False)
    kind = paths.filesystem_type(base)
    found = f"{base} ({kind}, {disk_space.left(base)})"
    if kind in ("tmpfs", "ramfs"):
        return "ok", found, ""
    least = paths.TMPFS_ROOM >> 20
    cure = f"give /dev/shm {least} MB and more (docker run --shm-size=1g): new servers are faster"
    return "warning", f"{found}; no tmpfs with {least} MB free", cure


def _socket_path(options: ServerOptions) -> _Finding:
    base = paths.socket_base(identity.choose(options.run_as))
    return "ok", f"{base} is short enough for a unix socket", ""


def _loopback(_: ServerOptions) -> _Finding:
    addresses = ports.loopback_addresses("localhost")
    if not addresses:
        return "failed", "localhost is not this machine", "add `127.0.0.1 localhost` to /etc/hosts"
    for address in addresses:
        if reason := ports.bind_error(address, 0):
            cure = "turn IPv6 on, or take ::1 out of /etc/hosts"
            return "warning", f"localhost is {address} too, but {reason}", cure
    return "ok", "localhost is " + " and ".join(addresses), ""


def _cache(_: ServerOptions) -> _Finding:
    place = paths.cache_dir()
    images = sorted((place / "images").glob("*/manifest.json"))
    with inventory.opened(place.resolve()) as directory:
        size = disk_space.size_of(directory) >> 20
    kind = paths.filesystem_type(place)
    found = f"{place} ({kind}, {disk_space.left(place)}), "
    found += f"{len(images)} images, {size} MB with the programs"
    if kind in _NETWORK:
        cure = "name a directory on a local disk in PGTEMP_CACHE_DIR"
        return "warning", f"{found}; locks on {kind} cannot be relied on", cure
    return "ok", found, ""


def _reflink(options: ServerOptions) -> _Finding:
    if sys.platform != "linux":
        return "ok", "not looked for on this system", ""
    base = paths.scratch_base(options.data_dir_prefix, keep=False)
    with tempfile.TemporaryFile(dir=base) as one, tempfile.TemporaryFile(dir=base) as other:
        one.write(bytes(4096))
        one.flush()
        try:
            fcntl.ioctl(other, _FICLONE, one.fileno())
        except OSError:
            return "ok", f"not on {paths.filesystem_type(base)}; files are copied", ""
    return "ok", f"{paths.filesystem_type(base)} has it; pgtemp copies all the same", ""


def _supervision(_: ServerOptions) -> _Finding:
    if not os.path.exists("/proc/self/stat"):
        cure = "mount /proc" if sys.platform == "linux" else ""
        return "warning", "no /proc: what a killed server leaves cannot be found", cure
    if not hasattr(os, "pidfd_open"):
        return "warning", "this Python has no pidfd: a forked child may delay the end", ""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        found = f"pidfd_open: {error.strerror}; a forked child that lives on may delay the end"
        return "warning", found, "allow pidfd_open in the container's seccomp profile"
    return "ok", "/proc and pidfd are there: what is killed leaves nothing", ""


def _leftovers(_: ServerOptions) -> _Finding:
    left = [one for one in inventory.homes() if not one.lives and one.is_ours]
    if not left:
        return "ok", "none", ""
    size = sum(one.size for one in left) >> 20
    found = f"{len(left)} directories of owners that are gone, {size} MB"
    return "warning", found, "pgtemp sweep (the next start of a server does it too)"


def _server(options: ServerOptions) -> _Finding:
    with PgTempDB.with_options(options):
        pass  # the first may run initdb
    start = time.perf_counter()
    with PgTempDB.with_options(options) as db, db.connect() as connection:
        connection.execute("SELECT 1")
        milliseconds = (time.perf_counter() - start) * 1000
        row = connection.execute("SHOW server_encoding").fetchone()
        encoding = row[0] if row is not None else ""
        return "ok", f"its first row after {milliseconds:.0f} ms; {encoding}", ""


def _extensions(options: ServerOptions) -> _Finding:
    with PgTempDB.with_options(options) as db, db.connect() as connection:
        rows = connection.execute("SELECT name FROM pg_available_extensions ORDER BY 1").fetchall()
        major = db.installation.major
    names = [str(name) for (name,) in rows]
    if _CONTRIB not in names:
        cure = f"install postgresql-contrib of {major}, or take another PostgreSQL"
        return "warning", f"only {', '.join(names)}: this one comes without contrib", cure
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
