"""The databases of one test, or of one module of tests, and the report if a test fails."""

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
class _Claimed:
    database: Database
    needs: Needs
    log: Path
    logged: int = 0  # bytes of the server log before the test started

    def __post_init__(self) -> None:
        self.mark()

    def mark(self) -> None:
        """Store the size of the server log at the start of a test."""
        try:
            self.logged = self.log.stat().st_size
        except OSError:
            self.logged = 0


@dataclass(slots=True)
class Case:
    """The databases of a test, or of several tests that share them.

    Attributes:
        name: the test's node id.
        failed: whether one of the tests has failed.
        commands: the commands that open the persisted databases.
    """

    suite: Suite
    name: str
    failed: bool = False
    commands: list[str] = field(default_factory=list)
    _claimed: list[_Claimed] = field(default_factory=list)

    def claim(self, needs: Needs, cluster: Cluster, usual: Build | Recipe | None) -> Database:
        """Claim one more database; see `Suite.claim`."""
        database = self.suite.claim(needs, cluster, usual)
        self._claimed.append(_Claimed(database, needs, database.shared.postmaster.log_path))
        return database

    def begin(self) -> None:
        """Record the start of another test with the same databases."""
        for claimed in self._claimed:
            claimed.mark()

    def explain(self) -> list[tuple[str, str]]:
        """Return the titles and texts of the sections for the report of a failed test."""
        self.failed = True
        sections: list[tuple[str, str]] = []
        for claimed in self._claimed:
            note = self._note(claimed)
            if note:
                sections.append(("pgtemp: database", note))
            if self.suite.options.log == "none":
                continue
            logged = serverlog.read(claimed.log, claimed.logged, claimed.database.dbname)
            if logged.lines:
                sections.append(("pgtemp: server log", logged.text()))
            if logged.statements:
                sections.append(("pgtemp: statements", logged.table()))
        return sections

    def end(self) -> None:
        """Release the databases, and persist those that the options select."""
        for claimed in self._claimed:
            keep = False
            with suppress(PgTempError):  # the report contains the error
                keep = self._is_selected(claimed) and self._persist(claimed) is not None
            self.suite.release(claimed.database, keep=keep)
        self._claimed.clear()

    def _note(self, claimed: _Claimed) -> str:
        if isinstance(claimed.database, RolledBack):
            return (
                "the test's changes were rolled back; to persist its database, omit rollback=True"
            )
        if not self._is_selected(claimed):
            return ""
        try:
            command = self._persist(claimed)
        except PgTempError as error:
            return f"not persisted: {error}"
        if command is None:
            most = self.suite.options.keep_most
            return f"not persisted: {most} databases are already persisted (--pgtemp-keep-most)"
        return f"after pytest exits, open it with\n    {command}"

    def _is_selected(self, claimed: _Claimed) -> bool:
        keep = self.suite.options.keep
        if isinstance(claimed.database, RolledBack):
            return False
        return claimed.needs.keep or keep == "all" or (keep == "failed" and self.failed)

    def _persist(self, claimed: _Claimed) -> str | None:
        command = self.suite.keep(claimed.database, self.name)
        if command is not None and command not in self.commands:
            self.commands.append(command)
        return command
