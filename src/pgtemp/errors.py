"""What pgtemp raises: one error with a cause, what was tried, and a remedy.

Everything a caller may want to catch is a PgTempError. Its first line is enough to act on; the
lines below it carry what was tried or PostgreSQL's own words. Nothing here knows about servers.
"""

from __future__ import annotations

from collections.abc import Sequence


class PgTempError(Exception):
    """Something could not be done.

    Args:
        cause: what went wrong, in one line.
        remedy: what to do about it, in one line.
        details: what was tried, or the words of the program that failed, a line each.
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
    """An option, a URI or a file that was given cannot be used."""


class InstallationError(PgTempError):
    """No PostgreSQL programs that fit were found, or they cannot be run."""


class ClusterError(PgTempError):
    """A server could not be made, did not start, or died."""


class TransferError(PgTempError):
    """A dump could not be loaded, or a database could not be dumped."""


class WardenError(PgTempError):
    """The process that supervises servers could not be started, or is gone."""


class DiskFullError(ClusterError):
    """There is too little room for another database."""


class LimitError(PgTempError):
    """There are as many leases or connections as there may be."""


class NoDatabaseError(PgTempError):
    """A database that was asked for is none that a lease can be had of."""


class PgTempWarning(UserWarning):
    """A test left something behind that it should have ended."""
