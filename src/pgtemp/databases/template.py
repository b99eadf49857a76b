"""Templates: sealed databases that databases are cloned from, built once.

A build works on a database with a name of its own and gets its final name last, so that a template
that can be found is whole; one that fails leaves nothing, and everybody who waited gets its error.
Before it is sealed it is connected to once: a clone then comes with its relation cache, and the
first connection to it takes 3 ms instead of 5.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from psycopg import Connection, errors

from pgtemp.databases import admin, transfer
from pgtemp.databases.admin import Admins
from pgtemp.errors import ClusterError, OptionError, PgTempError
from pgtemp.host.progress import step
from pgtemp.options import StrPath
from pgtemp.server.installation import Installation

# A callable gets the URI of the database to build; a path is SQL, a directory of SQL files in the
# order of their names, or a dump; several are applied in turn.
Build = Callable[[str], object] | StrPath | Sequence[StrPath]
BASE = "template1"
_log = logging.getLogger("pgtemp")


class Clones:
    """What a pool needs to know of the clones of one template."""

    def __init__(self, admins: Admins, source: str, owner: str, prefix: str) -> None:
        self._admins, self._source, self._owner, self._prefix = admins, source, owner, prefix

    def provision(self) -> str:
        """A new database; its name."""
        name = unique_name(self._prefix)
        with self._admins.connection() as connection:
            try:
                admin.clone(connection, name, self._source, self._owner, self._admins.closing)
            except errors.ObjectInUse as error:
                raise in_use(connection, self._source) from error
        return name

    def dispose(self, name: str) -> None:
        with self._admins.connection() as connection:
            admin.drop(connection, name, self._admins.elsewhere(name))

    def usable(self, name: str) -> bool:
        return True


class Builder:
    """Builds templates in one cluster, each name once however many ask at the same time."""

    def __init__(
        self,
        admins: Admins,
        programs: Installation,
        owner: str,
        uri_of: Callable[[str], str],
    ) -> None:
        self._admins, self._programs, self._owner, self._uri_of = admins, programs, owner, uri_of
        self._made: dict[str, tuple[Build, str, Future[str]]] = {}
        self._changing = threading.Lock()

    def ensure(self, name: str, build: Build, source: str = BASE) -> str:
        """The database of a template, built unless it is there.

        Raises:
            OptionError: the name stands for another build already, or a file is missing.
            PgTempError: the build failed; nothing of it is left. A callable's own error comes as
                it is.
        """
        _check_name(name)
        with self._changing:
            mine = name not in self._made
            known, base, made = self._made.setdefault(name, (build, source, Future()))
        if not mine:
            if (known, base) != (build, source):
                raise OptionError(
                    f"the template {name!r} was built from something else",
                    remedy="give each template a name of its own",
                )
            return made.result()
        try:
            with step(f"building template {name}"):
                made.set_result(self._build(name, build, source))
        except BaseException as error:
            with self._changing:
                del self._made[name]  # the next call tries again; who waits gets this error
            made.set_exception(error)
            raise
        return made.result()

    def _build(self, name: str, build: Build, source: str) -> str:
        fresh, final = unique_name(f"building_{name}"), unique_name(f"template_{name}")
        there = self._admins.elsewhere(fresh)
        with self._admins.connection() as connection:
            admin.clone(connection, fresh, source, self._owner, self._admins.closing)
        try:
            self._apply(build, fresh)
            with admin.connected(there) as inside:
                inside.execute("SELECT 1")
            with self._admins.connection() as connection:
                admin.seal(connection, fresh, final, there)
        except BaseException:
            self._discard(fresh)
            raise
        return final

    def _discard(self, dbname: str) -> None:
        """Drop what a failed build left; its error says more than ours would."""
        try:
            with self._admins.connection() as connection:
                admin.unseal(connection, dbname)
                admin.drop(connection, dbname, self._admins.elsewhere(dbname))
        except PgTempError as error:
            _log.warning("what a failed build left could not be dropped: %s", error)

    def _apply(self, build: Build, dbname: str) -> None:
        if callable(build):
            build(self._uri_of(dbname))
            return
        for path in [build] if isinstance(build, str | os.PathLike) else build:
            for dump in _files(Path(path)):
                to = self._admins.elsewhere(dbname)
                transfer.load(self._programs, to, dump, all_or_nothing=False)


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


def _check_name(name: str) -> None:
    if not name or "\0" in name or name.encode(errors="replace") != name.encode(errors="ignore"):
        raise OptionError(f"{name!r} cannot name a template", remedy="give it a name of letters")


def unique_name(prefix: str) -> str:
    """A database name that nobody has; PostgreSQL's limit is 63 bytes."""
    return f"{prefix.encode()[:50].decode(errors='ignore')}_{secrets.token_hex(4)}"


def in_use(connection: Connection[Any], dbname: str) -> PgTempError:
    """The error for a database that cannot be copied because somebody is in it."""
    who = admin.users_of(connection, dbname)
    return ClusterError(
        f"{dbname} cannot be copied while others are connected to it",
        remedy="close their connections first",
        details=who,
    )
