"""Dumps: into a database with psql or pg_restore, out of it with pg_dump.

psql rather than SQL over a driver, because what pg_dump writes holds psql's own commands
(`\\restrict`, `\\connect`, COPY data). Programs are reached over the private socket, so no
password is passed to any.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pgtemp.errors import TransferError
from pgtemp.host import disk_space, processes
from pgtemp.host.progress import step
from pgtemp.options.server import StrPath
from pgtemp.programs.installation import Installation
from pgtemp.sql.admin_connections import conninfo
from pgtemp.sql.answer_limits import ANSWER_SECONDS
from pgtemp.uri import ConnectionInfo

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LINKS = 40  # as many as the system follows
_LOCK_WAIT = "3s"  # for each table
_ARCHIVE = b"PGDMP"  # how the custom format begins
_TAR_TOC = b"toc.dat"  # the first member of the tar format
# What users run into most, by the words of psql and pg_restore.
_HINTS = (
    (
        r'role ".*" does not exist',
        "dump it with --no-owner --no-privileges, or begin it with CREATE ROLE",
    ),
    (
        r"unrecognized configuration parameter|unsupported version",
        "it was made by a newer PostgreSQL; ask for that version",
    ),
    (r"canceling statement due to statement timeout", "another session locks a table; close it"),
    (r'role ".*" already exists', "use pg_dump rather than pg_dumpall"),
    (
        r"invalid byte sequence for encoding|unrecognized data block type|invalid command \\",
        "is it compressed, or no dump at all? decompress it first",
    ),
)


def load(
    installation: Installation, to: ConnectionInfo, dump: StrPath, *, all_or_nothing: bool = True
) -> None:
    """Load a dump into a database.

    Args:
        to: the database; reached without a password.
        dump: plain SQL, or pg_dump's custom, tar or directory format.
        all_or_nothing: in one transaction, so that a bad dump leaves the database as it was.

    Raises:
        TransferError: it was not loaded; carries the program's own message and line.
    """
    path = Path(dump).absolute()
    if not path.exists():
        raise TransferError(f"there is no {path}", remedy="name a dump that exists")
    argv: list[str | Path]
    with step(f"loading {path.name}"):
        if _is_archive(path):
            argv = [installation.program("pg_restore"), "--no-owner", "--exit-on-error"]
            argv += ["--single-transaction"] if all_or_nothing else []
            argv += ["-d", conninfo(to), path]
        else:
            argv = [installation.program("psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1"]
            argv += ["--single-transaction"] if all_or_nothing else []
            argv += ["-d", conninfo(to), "-f", path]
        result = processes.run(argv, cwd=path.parent)
    if result.returncode != 0:
        raise _failed(f"{path} could not be loaded into {to.dbname}", result, Path(to.host))


def dump(installation: Installation, source: ConnectionInfo, to: StrPath) -> None:
    """Dump a database as plain SQL.

    Raises:
        TransferError: nothing was written; a file of that name stays as it was.
    """
    path = _final(Path(to).absolute())
    fresh = f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}"
    cause = f"{source.dbname} could not be dumped to {path}"
    with step(f"dumping {source.dbname} to {path.name}"), _writing(path):
        # A new file in an open directory: a file that another user puts there is never written.
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            output = os.open(fresh, _NEW, 0o600, dir_fd=directory)
            try:
                program = installation.program("pg_dump")
                result = processes.run(
                    [program, f"--lock-wait-timeout={_LOCK_WAIT}", "-d", conninfo(source)],
                    env={"PGCONNECT_TIMEOUT": f"{ANSWER_SECONDS:.0f}"},
                    output=output,
                )
                if result.returncode != 0:
                    raise _failed(cause, result, path.parent, "make room, or name another file")
                os.rename(fresh, path.name, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                os.unlink(fresh, dir_fd=directory)
                raise
            finally:
                os.close(output)
        finally:
            os.close(directory)


def _final(path: Path) -> Path:
    """The file that a path names, by way of links if they are the caller's.

    Raises:
        TransferError: it is no regular file, or another user's link leads there.
    """
    for _ in range(_LINKS):
        try:
            status = path.lstat()
        except OSError:
            return path  # a new file
        if stat.S_ISREG(status.st_mode):
            return path
        if not stat.S_ISLNK(status.st_mode):  # /dev/null, say, which root would replace
            break
        if status.st_uid not in (0, os.geteuid()):
            raise TransferError(
                f"{path} is a link of uid {status.st_uid}", remedy="name a file that is no link"
            )
        path = Path(os.path.normpath(path.parent.resolve() / path.readlink()))
    raise TransferError(f"{path} is no regular file", remedy="name another file")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TransferError(
            f"{path} cannot be written: {error.strerror}", remedy="name another file"
        ) from error


def psql(installation: Installation, to: ConnectionInfo, command: str) -> str:
    """What psql prints for a command. Raises TransferError."""
    argv = ["-X", "-v", "ON_ERROR_STOP=1", "-d", conninfo(to), "-c", command]
    result = processes.run([installation.program("psql"), *argv])
    if result.returncode != 0:
        raise _failed(f"psql failed in {to.dbname}", result, Path(to.host))
    return result.stdout


def psql_on_terminal(installation: Installation, to: ConnectionInfo) -> None:
    """Run psql on the terminal until the user leaves it. Raises TransferError without one."""
    try:
        with open("/dev/tty", "r+b", buffering=0) as terminal:
            processes.run_on(terminal, [installation.program("psql"), "-d", conninfo(to)])
    except OSError as error:
        raise TransferError(
            "there is no terminal for psql", remedy="give psql() a command"
        ) from error


def _is_archive(path: Path) -> bool:
    if path.is_dir():
        return True
    with open(path, "rb") as file:
        head = file.read(512)
    return head.startswith((_ARCHIVE, _TAR_TOC))


def _failed(
    cause: str,
    result: subprocess.CompletedProcess[str],
    where: Path,
    remedy: str = disk_space.REMEDY,
) -> TransferError:
    """The error for a program that failed.

    Args:
        where: it wrote to.
        remedy: where that is full.
    """
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    if disk_space.says_full(result.stderr):
        place = where.resolve()
        cause = f"{cause}: {place} is full ({disk_space.left(place)})"
    else:
        hints = [remedy for pattern, remedy in _HINTS if re.search(pattern, result.stderr)]
        remedy = hints[0] if hints else "see the program's words below"
    return TransferError(cause, remedy=remedy, details=lines[-10:])
