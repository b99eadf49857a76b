"""Read a client's database request, and what its login may do, from its StartupMessage.

    /app             a database of its own, from template app if there is one
    /app~checkout    the database of session checkout
    /app~template    the template app itself

`options=-c pgtemp.session=checkout`, or a parameter of that name, means the same as `~checkout`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pgtemp.allocation.isolation import DatabaseRequest
from pgtemp.errors import NoDatabaseError
from pgtemp.sql.statement_logging import WATCHING
from pgtemp.wire.startup import Startup, clip

SETTING = "pgtemp.session"
# Parameters with which a login alone changes nothing in a server.
_USUAL = {
    "user", "database", "application_name", "client_encoding", "datestyle", "intervalstyle",
    "timezone", "extra_float_digits", "geqo", "search_path", "statement_timeout",
}  # fmt: skip
# A short switch of `postgres` other than -c: for example, -d and -s turn on logging.
_SHORT_SWITCH = re.compile(r"(^|\s)-[^c\s-]")


def read(startup: Startup, *, literal: bool) -> DatabaseRequest:
    """Return the database request. Raises NoDatabaseError if it is missing or ambiguous.

    Args:
        literal: whether ~ is part of a name, and there are no sessions (`--single`).
    """
    if literal:
        if names_session(startup):
            raise NoDatabaseError(
                "with --single there are no sessions", remedy=f"leave out {SETTING}"
            )
        return DatabaseRequest(startup.user, clip(startup.dbname))
    # Some drivers do not decode the path of a URL, in which ~ may be written as %7E.
    dbname, tilde, session = re.sub("%7E", "~", startup.dbname, flags=re.I).partition("~")
    sessions = {session} if tilde else set()
    if names_session(startup):
        sessions |= {value for name, value in _settings(startup) if name.lower() == SETTING}
    problem = ""
    if not dbname:
        problem = "has no name"
    elif len(sessions) > 1:
        problem = "names more than one session"
    elif "" in sessions:
        problem = "names no session"
    if problem:
        raise NoDatabaseError(
            f'database "{startup.dbname}" {problem}',
            remedy="write /DBNAME, /DBNAME~SESSION or /DBNAME~template",
        )
    return DatabaseRequest(startup.user, clip(dbname), sessions.pop() if sessions else None)


def names_session(startup: Startup) -> bool:
    """Whether the session is in a parameter that the server receives."""
    parameters = startup.parameters
    return SETTING in parameters.get("options", "").lower() or any(
        name.lower() == SETTING for name in parameters
    )


def may_run_code(startup: Startup) -> bool:
    """Whether a login has settings that may run code, such as session_preload_libraries."""
    return not {name.lower() for name in startup.parameters} <= _USUAL


def may_log_statements(startup: Startup) -> bool:
    """Whether a login has settings that may log statements, even those that are only planned."""
    words = [word for pair in startup.parameters.items() for word in pair]
    names = " ".join(words).lower().replace("-", "_")
    switches = startup.parameters.get("options", "")
    return any(name in names for name in WATCHING) or _SHORT_SWITCH.search(switches) is not None


def _settings(startup: Startup) -> Iterator[tuple[str, str]]:
    """Yield the server settings of a StartupMessage, by name or in `options`.

    PostgreSQL docs, 34.1.2.
    """
    yield from startup.parameters.items()
    words = iter(_split(startup.parameters.get("options", "")))
    for word in words:
        if word == "-c":
            word = next(words, "")
        elif word.startswith(("-c", "--")):
            word = word[2:]
        else:
            continue
        name, _, value = word.partition("=")
        yield name.replace("-", "_"), value


def _split(options: str) -> list[str]:
    """Split at white space; a backslash escapes the next character."""
    words = re.findall(r"(?:\\.|[^\s\\])+", options, re.S)
    return [re.sub(r"\\(.)", r"\1", word, flags=re.S) for word in words]
