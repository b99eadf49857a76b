"""A recipe: the inputs of a template, and the hash of everything that determines its result.

If the result follows from the inputs, the recipe has a fingerprint and the template can be cached.
The result of a function, a command, or SQL that reads other files does not follow from the inputs;
such a recipe has no fingerprint unless it has a key or files to watch.
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

from pgtemp import libpq
from pgtemp.errors import OptionError, TransferError
from pgtemp.host import processes
from pgtemp.host.progress import step
from pgtemp.options.server import StrPath
from pgtemp.programs.installation import Installation
from pgtemp.sql import dump_restore, extensions
from pgtemp.sql.connection import connected
from pgtemp.sql.timeouts import LONG_SECONDS
from pgtemp.supervisor import supervision
from pgtemp.supervisor.leftovers import DATA
from pgtemp.templates import migrations
from pgtemp.uri import ConnectionInfo

# A callable gets the URI of the database to build; "cmd:…" is a shell command that gets the URI in
# DATABASE_URL; a path is an SQL file, a directory of SQL files, which are used in the order of
# their names, or a dump. Several steps are applied in turn.
Step = Callable[[str], object] | StrPath
Build = Step | Sequence[Step]
COMMAND = "cmd:"
_COMMAND_LINES = 12
_ENDINGS = (".sql", ".sql.gz")
# Commands of psql and SQL that read data from outside the file.
_READS_MORE = re.compile(
    rb"\\(i|ir|include|include_relative|copy|lo_import|getenv|!)(?=\s|$)"
    rb"|\\[a-z]+\s[^\n']*`"
    rb"|\bcopy\s[^;]*?\sfrom\s+(program\s+)?(e?'|\$)"
    rb"|\b(pg_read_file|pg_read_binary_file|lo_import)\s*\(",
    re.M | re.I,
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The steps that turn a database into a template.

    Attributes:
        build: the steps: a callable that gets a URI; "cmd:" followed by a shell command that gets
            the URI in DATABASE_URL; the path of an SQL file, of a directory of SQL files, of a
            dump, or of a persisted data directory; or a list of these. No steps by default.
        key: identifies the result of a callable or a command; change it when the result changes.
        watch: glob patterns of files that determine the result.
        extensions: extensions to create before the first step.
        cwd: the directory in which commands are run; None is the current directory.
        run: the name of a program's run; the template is cached only for this run.
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
        """The data directory, if the build consists of one; else None."""
        if not isinstance(self.build, str | os.PathLike):
            return None
        path = Path(self.build)
        found = [one for one in (path, path / DATA) if (one / "PG_VERSION").is_file()]
        return found[0] if found else None

    def fingerprint(self) -> str | None:
        """Return the hash of everything that determines the result; None if that is not known.

        Raises:
            OptionError: a file does not exist, or a pattern matches no file.
        """
        hashed = hashlib.sha256()
        declared = self.key is not None or bool(self.watch) or self.run is not None
        for part in self._parts(declared):
            if part is None:
                return None
            hashed.update(len(part).to_bytes(8, "big") + part)
        return hashed.hexdigest()

    def _parts(self, declared: bool) -> Iterator[bytes | None]:
        """Yield the parts to hash; None for a step whose result is not known.

        Args:
            declared: whether the recipe declares when its result changes (key, watch, run).
        """
        yield repr((self.key, self.run, self.extensions)).encode()
        for pattern in self.watch:
            for path in _watched(os.fspath(pattern)):
                yield os.fsencode(path)
                yield path.read_bytes()
        for one in _each(self.build):
            if callable(one):
                named = self.key is not None or bool(self.watch) or _is_importable(one)
                yield _name_of(one).encode() if declared and named else None
                continue
            if (command := _command(one)) is not None:
                yield f"{self._directory}\0{command}".encode() if declared else None
                continue
            for path in _files(Path(one)):
                for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                    content = dump_restore.uncompressed(file)
                    yield content if declared or not _reads_more(content) else None

    @property
    def _directory(self) -> str:
        return os.path.abspath(self.cwd) if self.cwd is not None else os.getcwd()

    def apply(self, programs: Installation, private: ConnectionInfo, info: ConnectionInfo) -> None:
        """Apply the steps to an existing database.

        Args:
            private: the connection parameters that pgtemp uses, as a superuser.
            info: the connection parameters that callables and commands get.

        Raises:
            PgTempError: a step failed. An error of a callable is raised unchanged.
        """
        if self.extensions:
            with connected(private) as connection, connection.given(LONG_SECONDS):
                extensions.create(connection, self.extensions, programs.major)
        for one in _each(self.build):
            if callable(one):
                _call(one, info.uri)
                continue
            if (command := _command(one)) is not None:
                _run(command, self._directory, info)
                continue
            for dump in _files(Path(one)):
                dump_restore.load(programs, private, dump, all_or_nothing=False)


def _each(build: Build) -> Sequence[Step]:
    """Return the steps of a build. Raises OptionError if it is not a valid build."""
    steps = [build] if callable(build) or isinstance(build, str | os.PathLike) else build
    if not isinstance(steps, list | tuple) or not all(
        callable(one) or isinstance(one, str | os.PathLike) for one in steps
    ):
        raise OptionError(
            f"{build!r} is not a valid build",
            remedy='specify a function, a path, "cmd:…", or a list of these',
        )
    return steps


def _call(build: Callable[[str], object], uri: str) -> None:
    """Call a function; if it returns a coroutine, run it until it completes.

    The coroutine runs in another thread, because this one may be running an event loop.
    """
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
        result = processes.run_command(command, libpq.child_environment(info), cwd, guard)
    if result.returncode != 0:
        lines = [line for line in result.stdout.splitlines() if line.strip()]
        raise TransferError(
            f"the command {command!r} failed with status {result.returncode}",
            remedy="its output is below; DATABASE_URL was the URL of the database to build",
            details=lines[-_COMMAND_LINES:],
        )


def _files(path: Path) -> list[Path]:
    """Return the file itself, or the SQL files of a directory in the order of their names.

    Numbers in names are compared by value, so that 2 precedes 10.
    """
    if not path.exists():
        raise OptionError(f"{path} does not exist", remedy="specify an existing file or directory")
    if path.is_dir() and (path / "toc.dat").exists():
        return [path]
    migrations.check_plain(path)
    if not path.is_dir():
        return [path]
    found = migrations.in_order(file for file in path.iterdir() if file.name.endswith(_ENDINGS))
    if not found:
        raise OptionError(
            f"{path} contains no .sql file", remedy="specify a directory of SQL files"
        )
    return found


def _watched(pattern: str) -> list[Path]:
    """Return the files that match a pattern; a directory stands for all files below it."""
    found = [Path(name) for name in glob.glob(pattern, recursive=True)]
    files = {path for path in found if path.is_file()}
    for path in found:
        if path.is_dir():
            files |= {inside for inside in path.rglob("*") if inside.is_file()}
    # The interpreter's bytecode files change even if the sources do not.
    files = {path for path in files if "__pycache__" not in path.parts}
    if not files:
        raise OptionError(
            f"no file to watch matches {pattern!r}",
            remedy="use the shell's syntax for patterns",
        )
    return sorted(files)


def _reads_more(content: bytes) -> bool:
    return content[:5] != b"PGDMP" and _READS_MORE.search(content) is not None


def _is_importable(build: object) -> bool:
    """Return whether another process can find the same callable by its module and name."""
    module = sys.modules.get(getattr(build, "__module__", ""))
    return getattr(module, getattr(build, "__qualname__", ""), None) is build


def _name_of(build: object) -> str:
    """Return where a callable is defined, so that two projects can use the same key."""
    inner = inspect.unwrap(build) if callable(build) else build
    if isinstance(inner, functools.partial):
        return f"{_name_of(inner.func)}\0{inner.args!r}\0{sorted(inner.keywords.items())!r}"
    code = getattr(inner, "__code__", None)
    where = code.co_filename if code is not None else type(inner).__module__
    return f"{where}\0{getattr(inner, '__qualname__', type(inner).__qualname__)}"
