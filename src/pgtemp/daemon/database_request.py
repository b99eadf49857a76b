"""What a client asks for, read from its StartupMessage.

    /app             a database of its own, from template app where there is one
    /app~checkout    the database of session checkout
    /app~template    the template app itself

`options=-c pgtemp.session=checkout`, or a parameter of that name, says the same as `~checkout`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pgtemp.allocation.isolation import DatabaseRequest
from pgtemp.errors import NoDatabaseError
from pgtemp.wire.startup import Startup, clip

SETTING = "pgtemp.session"


def read(startup: Startup) -> DatabaseRequest:
    """The wish. Raises NoDatabaseError where it cannot be told."""
    dbname, tilde, session = startup.dbname.partition("~")
    said = {session} if tilde else set()
    if names_session(startup):
        said |= {value for name, value in _settings(startup) if name.lower() == SETTING}
    wrong = ""
    if not dbname:
        wrong = "has no name"
    elif len(said) > 1:
        wrong = "names another session"
    elif "" in said:
        wrong = "names no session"
    if wrong:
        raise NoDatabaseError(
            f'database "{startup.dbname}" {wrong}',
            remedy="write /DBNAME, /DBNAME~SESSION or /DBNAME~template",
        )
    return DatabaseRequest(startup.user, clip(dbname), said.pop() if said else None)


def names_session(startup: Startup) -> bool:
    """Whether the session is part of what the server itself is told."""
    parameters = startup.parameters
    return SETTING in parameters.get("options", "").lower() or any(
        name.lower() == SETTING for name in parameters
    )


def _settings(startup: Startup) -> Iterator[tuple[str, str]]:
    """Server settings in a StartupMessage, by name or in `options` (PostgreSQL docs, 34.1.2)."""
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
    """At white space, where a backslash takes the next character as it is."""
    words = re.findall(r"(?:\\.|[^\s\\])+", options, re.S)
    return [re.sub(r"\\(.)", r"\1", word, flags=re.S) for word in words]
