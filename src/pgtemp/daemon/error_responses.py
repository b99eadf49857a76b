"""Why a client is turned away, as PostgreSQL would say it."""

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
    """A client that is told why it gets no database, or loses it."""

    def __init__(self, sqlstate: str, message: str, hint: str = "", detail: str = "") -> None:
        super().__init__(message)
        self.reply = replies.fatal(sqlstate, message, hint=hint, detail=detail)


class UnreachableError(RefusedError):
    """A client whose server cannot be reached; another one may be."""


def crashed(postmaster: Postmaster) -> RefusedError:
    """What somebody is told whose connection was taken along by a crash."""
    cause, log = "PostgreSQL has ended all connections after a crash", postmaster.log_tail()
    try:
        postmaster.check()
    except PgTempError as error:
        cause, log = error.cause, list(error.details)
    hint = "connect again; the end of the server's log is the detail"
    return RefusedError(_CRASH_SHUTDOWN, cause, hint, "\n".join(log))


def refusal(error: PgTempError) -> RefusedError:
    """The refusal for an error of ours."""
    fitting = (state for kind, state in _SQLSTATES if isinstance(error, kind))
    state = next(fitting, _CANNOT_CONNECT_NOW)
    return RefusedError(state, error.cause, error.remedy, "\n".join(error.details))
