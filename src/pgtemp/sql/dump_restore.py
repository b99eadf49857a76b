"""Load a dump into a database with psql or pg_restore; dump a database with pg_dump.

SQL is loaded with psql instead of a driver, because the output of pg_dump contains psql commands
(`\\restrict`, `\\connect`, COPY data). The programs connect over the server's private socket, so
they need no password.
"""

from __future__ import annotations

import gzip
import mmap
import os
import re
import secrets
import shutil
import stat
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pgtemp import libpq
from pgtemp.errors import TransferError
from pgtemp.host import disk_space, processes, user_paths
from pgtemp.host.progress import step
from pgtemp.options.server import StrPath
from pgtemp.programs.installation import Installation
from pgtemp.sql import extensions
from pgtemp.sql.connection import conninfo
from pgtemp.sql.timeouts import ANSWER_SECONDS, NoAnswerError, check_running
from pgtemp.uri import ConnectionInfo

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LOCK_WAIT = "3s"  # for each table
_ARCHIVE = b"PGDMP"  # the first bytes of the custom format
_TAR_TOC = b"toc.dat"  # the first member of the tar format
_GZIP = b"\x1f\x8b"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# A command of psql that continues in another database.
_CONNECT = re.compile(rb'^\\c(?:onnect)?[ \t]+(?!-?[ \t]*\r?$)("[^"\n]*"|[^\s;]+)', re.M)
_WHERE = r"\echo :DBNAME"
_SEE_MESSAGES = "see the program's messages below"
_ONE_DATABASE = "dump a single database, with pg_dump without --create"
# The most common errors of psql and pg_restore, and a remedy for each.
_HINTS = (
    (
        r"unrecognized configuration parameter|unsupported version",
        "it was created by a newer PostgreSQL; request that version",
    ),
    (r"canceling statement due to statement timeout", "another session locks a table; close it"),
    (r'role ".*" already exists|CREATE DATABASE cannot run', _ONE_DATABASE),
    (
        r"invalid byte sequence for encoding|unrecognized data block type|invalid command \\",
        "the file may be compressed, or may not be a dump; decompress it first",
    ),
)
_ROLE_MISSING = r'role ".*" does not exist'
_NOT_THERE = r'(relation|table|schema|function|type|sequence|view|index) ".*" does not exist'


def load(
    installation: Installation, to: ConnectionInfo, dump: StrPath, *, all_or_nothing: bool = True
) -> None:
    """Load a dump into a database.

    Args:
        to: the database; it is reached without a password.
        dump: plain SQL, or pg_dump's custom, tar or directory format; a file may be compressed
            with gzip.
        all_or_nothing: load it in one transaction, so that a bad dump does not change the database.

    Raises:
        TransferError: it could not be loaded, or ends in another database; the error contains the
            program's message and line.
    """
    path = Path(dump).absolute()
    if not path.exists():
        raise TransferError(f"{path} does not exist", remedy="specify an existing dump")
    with step(f"loading {path.name}"), _decompressed(path) as plain:
        archive = _is_archive(plain)
        argv: list[str | Path]
        if archive:
            argv = [installation.program("pg_restore"), "--no-owner", "--exit-on-error"]
            argv += ["--single-transaction"] if all_or_nothing else []
            argv += ["-d", conninfo(to), plain]
        else:
            _check_plain(plain, path, to.dbname)
            argv = [installation.program("psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1"]
            argv += ["--single-transaction"] if all_or_nothing else []
            # A file that is in another encoding says so (SET client_encoding).
            argv += ["-d", conninfo(to, client_encoding="UTF8"), "-f", plain, "-c", _WHERE]
        result = processes.run(argv, cwd=path.parent)
    result.stderr = result.stderr.replace(str(plain), str(path))
    cause = f"{path} could not be loaded into {to.dbname}"
    if result.returncode != 0:
        remedy = _remedy_for(result.stderr, installation.major, archive=archive)
        raise _failed(cause, result, Path(to.host), failure=remedy)
    ended_in = result.stdout.rstrip("\n").rpartition("\n")[2]
    if not archive and ended_in != to.dbname:
        raise TransferError(f"{cause}: it ends in the database {ended_in!r}", remedy=_ONE_DATABASE)


@contextmanager
def _decompressed(path: Path) -> Iterator[Path]:
    """Yield the path of the uncompressed file: `path` itself if it is not compressed by gzip."""
    if path.is_dir() or not head(path).startswith(_GZIP):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="pgtemp-load-") as directory:
        plain = Path(directory) / path.name.removesuffix(".gz")
        try:
            with gzip.open(path) as compressed, open(plain, "wb") as file:
                shutil.copyfileobj(compressed, file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise TransferError(
                f"{path} cannot be decompressed: {error}", remedy="compress it again with gzip"
            ) from error
        yield plain


def uncompressed(path: Path) -> bytes:
    """Return the content of a file, uncompressed if it is compressed by gzip."""
    with _decompressed(path) as plain:
        return plain.read_bytes()


def _check_plain(plain: Path, path: Path, dbname: str) -> None:
    """Raise TransferError if psql would misread SQL, or would load it into another database.

    Args:
        path: the name of the file for messages.
    """
    if head(plain).startswith(_UTF_16):
        raise TransferError(
            f"{path} is encoded in UTF-16",
            remedy="save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
        )
    for line, found in _connects(plain):
        name = found.decode(errors="replace").strip("\"'")
        if name != dbname:
            raise TransferError(
                f"{path}:{line} continues in the database {name} (\\connect), and not in {dbname}",
                remedy=_ONE_DATABASE,
            )


def _connects(plain: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the line and the database of each command that connects to a database."""
    if plain.stat().st_size == 0:  # mmap refuses an empty file
        return
    with open(plain, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for found in _CONNECT.finditer(content):
            yield content[: found.start()].count(b"\n") + 1, found[1]


def _remedy_for(message: str, major: int, *, archive: bool) -> str:
    """Return the remedy for an error of psql or pg_restore."""
    if missing := extensions.missing_in(message, major):
        return missing
    if re.search(_ROLE_MISSING, message):
        roles = "create its roles first (a list of steps can begin with SQL that creates them)"
        first = roles if archive else "add CREATE ROLE at its start"
        return f"{first}, or dump it with --no-owner --no-privileges"
    if re.search(_NOT_THERE, message) and not archive:
        return "if the dump was made with --clean, make it with --if-exists as well"
    hints = [remedy for pattern, remedy in _HINTS if re.search(pattern, message)]
    return hints[0] if hints else _SEE_MESSAGES


def dump(installation: Installation, source: ConnectionInfo, to: StrPath) -> None:
    """Dump a database as plain SQL.

    Raises:
        TransferError: nothing was written; an existing file of that name is unchanged.
    """
    path = Path(to).absolute()
    cause = f"{source.dbname} could not be dumped to {path}"
    with (
        step(f"dumping {source.dbname} to {path.name}"),
        _dump_errors(path, cause),
        user_paths.locate(path) as place,  # follows a link of the caller, and does not replace it
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
                check=lambda: check_running(Path(source.host).resolve().parent),
            )
            if result.returncode != 0:
                remedy = _remedy_for(result.stderr, installation.major, archive=True)
                raise _failed(
                    cause, result, path.parent, "free some space, or specify another file", remedy
                )
            os.rename(fresh, place.name, src_dir_fd=place.fd, dst_dir_fd=place.fd)
        except BaseException:
            os.unlink(fresh, dir_fd=place.fd)
            raise
        finally:
            os.close(output)


def _is_regular(place: user_paths.Location) -> bool:
    """Return whether a file is regular, or does not exist yet."""
    try:
        status = os.stat(place.name, dir_fd=place.fd, follow_symlinks=False)
    except FileNotFoundError:
        return True
    return stat.S_ISREG(status.st_mode)


@contextmanager
def _dump_errors(path: Path, cause: str) -> Iterator[None]:
    try:
        yield
    except NoAnswerError as error:
        raise TransferError(f"{cause}: {error}", remedy="start a new server") from error
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
    return path.is_dir() or head(path).startswith((_ARCHIVE, _TAR_TOC))


def head(path: Path, size: int = 512) -> bytes:
    """Return the first bytes of a file."""
    with open(path, "rb") as file:
        return file.read(size)


def _failed(
    cause: str,
    result: subprocess.CompletedProcess[str],
    directory: Path,
    full: str = disk_space.REMEDY,
    failure: str = _SEE_MESSAGES,
) -> TransferError:
    """Return the error for a program that failed.

    Args:
        directory: the directory that the program wrote to.
        full: the remedy if the disk of `directory` is full.
        failure: the remedy for any other failure.
    """
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    if disk_space.says_full(result.stderr):
        directory = directory.resolve()
        cause = f"{cause}: {directory} is full ({disk_space.free_text(directory)})"
        failure = full
    return TransferError(cause, remedy=failure, details=lines[-10:])
