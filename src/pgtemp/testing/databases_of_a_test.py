"""What one test, or one module of tests, holds; and what is said of it when it fails."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from pgtemp.cluster import Cluster
from pgtemp.database import Database
from pgtemp.errors import PgTempError
from pgtemp.templates.recipe import Build, Recipe
from pgtemp.testing import serverlog
from pgtemp.testing.requirements import Needs
from pgtemp.testing.rollback import RolledBack
from pgtemp.testing.suite import Suite


@dataclass(slots=True)
class _Held:
    database: Database
    needs: Needs
    log: Path
    logged: int = 0  # bytes of the server's log before the test began

    def __post_init__(self) -> None:
        self.mark()

    def mark(self) -> None:
        """A test begins."""
        try:
            self.logged = self.log.stat().st_size
        except OSError:
            self.logged = 0


@dataclass(slots=True)
class Case:
    """The databases of a test.

    Attributes:
        name: the test's node id.
        failed: whether it, or one of the tests that share these databases, has failed.
        kept: the commands that open what is kept.
    """

    suite: Suite
    name: str
    failed: bool = False
    kept: list[str] = field(default_factory=list)
    _held: list[_Held] = field(default_factory=list)

    def claim(self, needs: Needs, cluster: Cluster, usual: Build | Recipe | None) -> Database:
        """One more database; as `Suite.claim`."""
        database = self.suite.claim(needs, cluster, usual)
        self._held.append(_Held(database, needs, database.works.server.log_path))
        return database

    def begin(self) -> None:
        """Another test begins, with the same databases."""
        for held in self._held:
            held.mark()

    def explain(self) -> list[tuple[str, str]]:
        """What the report of a failed test should have: titles and texts."""
        self.failed = True
        sections: list[tuple[str, str]] = []
        for held in self._held:
            said = self._opened_with(held)
            if said:
                sections.append(("pgtemp: database", said))
            if self.suite.options.log == "none":
                continue
            logged = serverlog.read(held.log, held.logged, held.database.dbname)
            if logged.lines:
                sections.append(("pgtemp: server log", logged.text()))
            if logged.statements:
                sections.append(("pgtemp: statements", logged.table()))
        return sections

    def end(self) -> None:
        """Give the databases back, or have them kept."""
        for held in self._held:
            keep = False
            with suppress(PgTempError):  # which the report has said
                keep = self._is_kept(held) and self._keep(held) is not None
            self.suite.release(held.database, keep=keep)
        self._held.clear()

    def _opened_with(self, held: _Held) -> str:
        if isinstance(held.database, RolledBack):
            return "what the test did was rolled back; without rollback=True it is kept"
        if not self._is_kept(held):
            return ""
        try:
            command = self._keep(held)
        except PgTempError as error:
            return f"not kept: {error}"
        if command is None:
            most = self.suite.options.keep_most
            return f"not kept: {most} are kept already (--pgtemp-keep-most)"
        return f"when pytest has ended, open it with\n    {command}"

    def _is_kept(self, held: _Held) -> bool:
        keep = self.suite.options.keep
        if isinstance(held.database, RolledBack):
            return False
        return held.needs.keep or keep == "all" or (keep == "failed" and self.failed)

    def _keep(self, held: _Held) -> str | None:
        command = self.suite.keep(held.database, self.name)
        if command is not None and command not in self.kept:
            self.kept.append(command)
        return command
