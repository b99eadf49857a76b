"""Load a dump into a database with psql or pg_restore; dump a database with pg_dump.

SQL is loaded with psql instead of a driver, because the output of pg_dump contains psql commands
(`\\restrict`, `\\connect`, COPY data). The programs connect over the server's private socket, so
they need no password.
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

from pgtemp import libpq
from pgtemp.errors import TransferError
from pgtemp.host import disk_space, processes, reach
from pgtemp.host.progress import step
from pgtemp.options.server import StrPath
from pgtemp.programs.installation import Installation
from pgtemp.sql.answer_limits import ANSWER_SECONDS
from pgtemp.sql.connection import conninfo
from pgtemp.uri import ConnectionInfo

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOCK_WAIT = "3s"  # for each table
_ARCHIVE = b"PGDMP"  # the first bytes of the custom format
_TAR_TOC = b"toc.dat"  # the first member of the tar format
# The most common errors of psql and pg_restore, and a remedy for each.
_HINTS = (
    (
        r'role ".*" does not exist',
        "dump it with --no-owner --no-privileges, or add CREATE ROLE at its start",
    ),
    (
        r"unrecognized configuration parameter|unsupported version",
        "it was created by a newer PostgreSQL; request that version",
    ),
    (r"canceling statement due to statement timeout", "another session locks a table; close it"),
    (r'role ".*" already exists', "use pg_dump rather than pg_dumpall"),
    (
        r"invalid byte sequence for encoding|unrecognized data block type|invalid command \\",
        "the file may be compressed, or may not be a dump; decompress it first",
    ),
)


def load(
    installation: Installation, to: ConnectionInfo, dump: StrPath, *, all_or_nothing: bool = True
) -> None:
    """Load a dump into a database.

    Args:
        to: the database; no password is used.
        dump: plain SQL, or pg_dump's custom, tar or directory format.
        all_or_nothing: load it in one transaction, so that a bad dump does not change the database.

    Raises:
        TransferError: it could not be loaded; the error contains the program's message and the line
            number.
    """
    path = Path(dump).absolute()
    if not path.exists():
        raise TransferError(f"{path} does not exist", remedy="specify an existing dump")
    argv: list[str | Path]
    with step(f"loading {path.name}"):
        if _is_archive(path):
            argv = [installation.program("pg_restore"), "--no-owner", "--exit-on-error"]
            argv += ["--single-transaction"] if all_or_nothing else []
            argv += ["-d", conninfo(to), path]
        else:
            argv = [installation.program("psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1"]
            argv += ["--single-transaction"] if all_or_nothing else []
            # A file in another encoding sets it (SET client_encoding).
            argv += ["-d", conninfo(to, client_encoding="UTF8"), "-f", path]
        result = processes.run(argv, cwd=path.parent)
    if result.returncode != 0:
        raise _failed(f"{path} could not be loaded into {to.dbname}", result, Path(to.host))


def dump(installation: Installation, source: ConnectionInfo, to: StrPath) -> None:
    """Dump a database as plain SQL.

    Raises:
        TransferError: nothing was written; an existing file of that name is unchanged.
    """
    path = Path(to).absolute()
    cause = f"{source.dbname} could not be dumped to {path}"
    with (
        step(f"dumping {source.dbname} to {path.name}"),
        _write_errors(path),
        reach.locate(path) as place,  # follows a link of the caller, and does not replace it
    ):
        if not _is_regular(place):  # /dev/null, for example, which root would replace
            raise TransferError(f"{path} is not a regular file", remedy="specify another file")
        # A new file in an open directory: pgtemp never writes to a file that another user creates
        # there.
        fresh = f".{place.name}.{os.getpid()}.{secrets.token_hex(4)}"
        output = os.open(fresh, _NEW, 0o600, dir_fd=place.fd)
        try:
            result = processes.run(
                [
                    installation.program("pg_dump"),
                    f"--lock-wait-timeout={_LOCK_WAIT}",
                    # pg_dump ignores errors when it writes directly to standard output.
                    "--file=/dev/stdout",
                    "-d",
                    conninfo(source),
                ],
                env={"PGCONNECT_TIMEOUT": f"{ANSWER_SECONDS:.0f}"},
                output=output,
            )
            if result.returncode != 0:
                remedy = "free some space, or specify another file"
                raise _failed(cause, result, path.parent, remedy)
            os.rename(fresh, place.name, src_dir_fd=place.fd, dst_dir_fd=place.fd)
        except BaseException:
            os.unlink(fresh, dir_fd=place.fd)
            raise
        finally:
            os.close(output)


def _is_regular(place: reach.Location) -> bool:
    """Return whether a file is regular, or does not exist yet."""
    try:
        status = os.stat(place.name, dir_fd=place.fd, follow_symlinks=False)
    except FileNotFoundError:
        return True
    return stat.S_ISREG(status.st_mode)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TransferError(
            f"cannot write to {path}: {error.strerror}", remedy="specify another file"
        ) from error


def psql(installation: Installation, to: ConnectionInfo, command: str) -> str:
    """Run a command in psql and return its output. Raises TransferError."""
    argv = ["-X", "-v", "ON_ERROR_STOP=1", "-d", conninfo(to), "-c", command]
    result = processes.run([installation.program("psql"), *argv])
    if result.returncode != 0:
        raise _failed(f"psql failed in {to.dbname}", result, Path(to.host))
    return result.stdout


def psql_on_terminal(installation: Installation, to: ConnectionInfo) -> None:
    """Run psql on the terminal until it exits. Raises TransferError if there is no terminal."""
    try:
        with open("/dev/tty", "r+b", buffering=0) as terminal:
            command: list[str | Path] = [installation.program("psql"), "-d", conninfo(to)]
            processes.run_on(terminal, command, libpq.child_environment(to))
    except OSError as error:
        raise TransferError(
            "there is no terminal for psql", remedy="pass a command to psql()"
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
    directory: Path,
    remedy: str = disk_space.REMEDY,
) -> TransferError:
    """Return the error for a program that failed.

    Args:
        directory: the directory that the program wrote to.
        remedy: the remedy if the disk of `directory` is full.
    """
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    if disk_space.says_full(result.stderr):
        directory = directory.resolve()
        cause = f"{cause}: {directory} is full ({disk_space.free_text(directory)})"
    else:
        hints = [remedy for pattern, remedy in _HINTS if re.search(pattern, result.stderr)]
        remedy = hints[0] if hints else "see the program's messages below"
    return TransferError(cause, remedy=remedy, details=lines[-10:])
