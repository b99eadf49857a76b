"""The exceptions of pgtemp: each states a cause, the details of what was tried, and a remedy.

Every error that a caller may want to catch is a PgTempError. Its first line is enough to act on;
the lines below it list what was tried, or quote PostgreSQL. This module does not depend on the rest
of pgtemp.
"""

from __future__ import annotations

from collections.abc import Sequence


class PgTempError(Exception):
    """An operation failed.

    Args:
        cause: what went wrong, in one line.
        remedy: what to do about it, in one line.
        details: what was tried, or the output of the program that failed; one string per line.
    """

    def __init__(self, cause: str, *, remedy: str = "", details: Sequence[str] = ()) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy
        self.details = tuple(details)

    def __str__(self) -> str:
        first = f"{self.cause}; {self.remedy}" if self.remedy else self.cause
        return "\n".join([first, *(f"    {line}" for line in self.details)])


class OptionError(PgTempError, ValueError):
    """An option, a URI or a file that the caller gave cannot be used."""


class InstallationError(PgTempError):
    """No suitable PostgreSQL programs were found, or they cannot be run."""


class ClusterError(PgTempError):
    """A server could not be created, did not start, or exited unexpectedly."""


class TransferError(PgTempError):
    """A dump could not be restored, or a database could not be dumped."""


class WardenError(PgTempError):
    """The supervisor process could not be started, or it has exited."""


class DiskFullError(ClusterError):
    """The disk has too little free space, for example for another database."""


class LimitError(PgTempError):
    """The limit on leases or connections has been reached."""


class NoDatabaseError(PgTempError):
    """The requested database name does not denote a database that can be leased."""


class PgTempWarning(UserWarning):
    """A test left something open that it should have closed, such as a connection."""
