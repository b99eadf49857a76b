"""Errors for clients that are refused or disconnected, as PostgreSQL's ErrorResponse messages."""

from __future__ import annotations

from pgtemp.errors import DiskFullError, LimitError, NoDatabaseError, PgTempError
from pgtemp.server.postmaster import Postmaster
from pgtemp.wire import replies

_SQLSTATES: tuple[tuple[type[PgTempError], str], ...] = (
    (DiskFullError, "53100"),
    (LimitError, "53300"),
    (NoDatabaseError, "3D000"),
)
_CANNOT_CONNECT_NOW = "57P03"
_CRASH_SHUTDOWN = "57P02"


class RefusedError(Exception):
    """A client gets no database, or loses it; `reply` is the ErrorResponse for it."""

    def __init__(self, sqlstate: str, message: str, hint: str = "", detail: str = "") -> None:
        super().__init__(message)
        self.reply = replies.fatal(sqlstate, message, hint=hint, detail=detail)


class UnreachableError(RefusedError):
    """The client's server cannot be reached; a retry gets another server."""


def crashed(postmaster: Postmaster) -> RefusedError:
    """Return the error for a client whose connection was closed by a crash of its server."""
    cause = "PostgreSQL closed all connections after a crash"
    log = postmaster.log_tail()
    try:
        postmaster.check()
    except PgTempError as error:
        cause, log = error.cause, list(error.details)
    hint = "connect again; the detail is the end of the server log"
    return RefusedError(_CRASH_SHUTDOWN, cause, hint, "\n".join(log))


def refusal(error: PgTempError) -> RefusedError:
    """Return the refusal for one of pgtemp's errors."""
    matching = (sqlstate for kind, sqlstate in _SQLSTATES if isinstance(error, kind))
    sqlstate = next(matching, _CANNOT_CONNECT_NOW)
    return RefusedError(sqlstate, error.cause, error.remedy, "\n".join(error.details))
