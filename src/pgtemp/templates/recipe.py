"""What a template is made from, and the hash of everything that decides how it comes out.

A recipe whose outcome can be told from its parts has a fingerprint, and what was built from it
can be kept for tomorrow. One that cannot (a function, a command, SQL that reads other files) has
none until it is told a key, or which files to watch.
"""

from __future__ import annotations

import asyncio
import functools
import glob
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pgtemp.errors import OptionError, TransferError
from pgtemp.host import processes
from pgtemp.host.progress import step
from pgtemp.options.server import StrPath
from pgtemp.programs.installation import Installation
from pgtemp.sql import admin_connections, dump_restore, extensions
from pgtemp.sql.answer_limits import LONG_SECONDS
from pgtemp.supervisor import supervision
from pgtemp.supervisor.leftovers import DATA
from pgtemp.uri import ConnectionInfo

# A callable gets the URI of the database to build; "cmd:…" is a shell command that gets it in
# DATABASE_URL; a path is SQL, a directory of SQL files in the order of their names, or a dump;
# several are applied in turn.
Step = Callable[[str], object] | StrPath
Build = Step | Sequence[Step]
COMMAND = "cmd:"
_COMMAND_LINES = 12
# psql's commands, and SQL's, that read what is not in the file itself.
_READS_MORE = re.compile(
    rb"\\(i|ir|include|include_relative|copy|lo_import|getenv|!)(?=\s|$)"
    rb"|\\[a-z]+\s[^\n']*`"
    rb"|\bcopy\s[^;]*?\sfrom\s+(program\s+)?(e?'|\$)"
    rb"|\b(pg_read_file|pg_read_binary_file|lo_import)\s*\(",
    re.M | re.I,
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What turns one database into a template.

    Attributes:
        build: what is applied: a callable that gets a URI; "cmd:" and a shell command that gets
            the URI in DATABASE_URL; a path of SQL, of a directory of SQL files, of a dump, or of
            a data directory that was kept; or several of these. Nothing by default.
        key: says, for a callable or a command, when it would come out otherwise.
        watch: glob patterns of files that decide how it comes out.
        extensions: created first.
        cwd: where commands are run; None is the current directory.
        run: names the run of a program for which alone the template is kept.
    """

    build: Build = ()
    key: str | None = None
    watch: Sequence[StrPath] = ()
    extensions: Sequence[str] = ()
    cwd: StrPath | None = None
    run: str | None = None

    def __post_init__(self) -> None:
        watch = [self.watch] if isinstance(self.watch, str | os.PathLike) else self.watch
        object.__setattr__(self, "watch", tuple(os.fspath(pattern) for pattern in watch))
        object.__setattr__(self, "extensions", tuple(self.extensions))

    @property
    def data_dir(self) -> Path | None:
        """The data directory that is the build, where it is one."""
        if not isinstance(self.build, str | os.PathLike):
            return None
        path = Path(self.build)
        found = [one for one in (path, path / DATA) if (one / "PG_VERSION").is_file()]
        return found[0] if found else None

    def fingerprint(self) -> str | None:
        """The hash of what decides the outcome; None where that is not known.

        Raises:
            OptionError: a file is missing, or a pattern fits none.
        """
        hashed = hashlib.sha256()
        told = self.key is not None or bool(self.watch) or self.run is not None
        for part in self._parts(told):
            if part is None:
                return None
            hashed.update(len(part).to_bytes(8, "big") + part)
        return hashed.hexdigest()

    def _parts(self, told: bool) -> Iterator[bytes | None]:
        yield repr((self.key, self.run, self.extensions)).encode()
        for pattern in self.watch:
            for path in _watched(os.fspath(pattern)):
                yield os.fsencode(path)
                yield path.read_bytes()
        for one in _each(self.build):
            if callable(one):
                alone = self.key is None and not self.watch
                yield _name_of(one).encode() if told and (not alone or _is_known(one)) else None
                continue
            if (command := _command(one)) is not None:
                yield f"{self._place}\0{command}".encode() if told else None
                continue
            for path in _files(Path(one)):
                for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                    content = file.read_bytes()
                    yield content if told or not _reads_more(content) else None

    @property
    def _place(self) -> str:
        return os.path.abspath(self.cwd) if self.cwd is not None else os.getcwd()

    def apply(self, programs: Installation, private: ConnectionInfo, info: ConnectionInfo) -> None:
        """Build, in a database that is there.

        Args:
            private: how pgtemp reaches the database, as a superuser.
            info: how everybody else does.

        Raises:
            PgTempError: it failed. A callable's own error comes as it is.
        """
        if self.extensions:
            with admin_connections.connected(private) as connection, connection.given(LONG_SECONDS):
                extensions.create(connection, self.extensions, programs.major)
        for one in _each(self.build):
            if callable(one):
                _call(one, info.uri)
                continue
            if (command := _command(one)) is not None:
                _run(command, self._place, info)
                continue
            for dump in _files(Path(one)):
                dump_restore.load(programs, private, dump, all_or_nothing=False)


def _each(build: Build) -> Sequence[Step]:
    """The steps of a build. Raises OptionError where it is none."""
    steps = [build] if callable(build) or isinstance(build, str | os.PathLike) else build
    if not isinstance(steps, list | tuple) or not all(
        callable(one) or isinstance(one, str | os.PathLike) for one in steps
    ):
        raise OptionError(
            f"{build!r} builds nothing",
            remedy='give a function, a path, "cmd:…", or a list of these',
        )
    return steps


def _call(build: Callable[[str], object], uri: str) -> None:
    """A coroutine function is run to its end, in a thread because a loop may run in this one."""
    result = build(uri)
    if inspect.iscoroutine(result):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, result).result()


def _command(step: StrPath) -> str | None:
    if isinstance(step, str) and step.startswith(COMMAND):
        return step.removeprefix(COMMAND).strip()
    return None


def _run(command: str, cwd: str, info: ConnectionInfo) -> None:
    with step(f"running {command}"), supervision.guarded() as guard:
        result = processes.run_command(command, info.environment(), cwd, guard)
    if result.returncode != 0:
        lines = [line for line in result.stdout.splitlines() if line.strip()]
        raise TransferError(
            f"the command {command!r} failed with status {result.returncode}",
            remedy="it was run with DATABASE_URL set to the database to build",
            details=lines[-_COMMAND_LINES:],
        )


def _files(path: Path) -> list[Path]:
    """A file, or the SQL files of a directory in the order of their names."""
    if not path.exists():
        raise OptionError(f"there is no {path}", remedy="name a file or a directory that exists")
    if not path.is_dir() or (path / "toc.dat").exists():
        return [path]
    found = sorted(path.glob("*.sql"))
    if not found:
        raise OptionError(f"{path} holds no .sql file", remedy="name a directory of SQL files")
    return found


def _watched(pattern: str) -> list[Path]:
    """The files that a pattern stands for; a directory stands for all in it."""
    found = [Path(name) for name in glob.glob(pattern, recursive=True)]
    files = {path for path in found if path.is_file()}
    for path in found:
        if path.is_dir():
            files |= {inside for inside in path.rglob("*") if inside.is_file()}
    # What an interpreter writes beside the sources changes without them.
    files = {path for path in files if "__pycache__" not in path.parts}
    if not files:
        raise OptionError(
            f"there is no file {pattern!r} to watch", remedy="patterns are those of the shell"
        )
    return sorted(files)


def _reads_more(content: bytes) -> bool:
    return content[:5] != b"PGDMP" and _READS_MORE.search(content) is not None


def _is_known(build: object) -> bool:
    """Whether another process finds the same callable under its name, as it does a function's."""
    module = sys.modules.get(getattr(build, "__module__", ""))
    return getattr(module, getattr(build, "__qualname__", ""), None) is build


def _name_of(build: object) -> str:
    """Where a callable comes from, so that two projects may use the same key."""
    inner = inspect.unwrap(build) if callable(build) else build
    if isinstance(inner, functools.partial):
        return f"{_name_of(inner.func)}\0{inner.args!r}\0{sorted(inner.keywords.items())!r}"
    code = getattr(inner, "__code__", None)
    where = code.co_filename if code is not None else type(inner).__module__
    return f"{where}\0{getattr(inner, '__qualname__', type(inner).__qualname__)}"
