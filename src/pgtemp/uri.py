"""Connection information: frozen, and turned into a URL, libpq keywords or environment variables.

libpq's own parser reads URLs (PostgreSQL docs, 34.1.1 "Connection Strings"), through psycopg.
Passwords are in what is asked for by name, never in a repr.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode

from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import ProgrammingError

from pgtemp.errors import OptionError

_EXAMPLE = "write it like postgresql://user:password@localhost:6543/dbname"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionInfo:
    """How to reach a database. `host` may be a directory, which holds the server's unix socket."""

    host: str
    port: int
    user: str
    password: str | None = field(default=None, repr=False)
    dbname: str

    @property
    def uri(self) -> str:
        """A URL that every driver understands, with the password."""
        login = quote(self.user, safe="")
        if self.password is not None:
            login += ":" + quote(self.password, safe="")
        path = quote(self.dbname, safe="~")
        if self.host.startswith("/"):
            query = urlencode({"host": self.host, "port": self.port}, quote_via=quote)
            return f"postgresql://{login}@/{path}?{query}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"postgresql://{login}@{host}:{self.port}/{path}"

    @property
    def conninfo(self) -> str:
        """libpq's keywords and values, without the password: fit for a command line."""
        return make_conninfo(host=self.host, port=self.port, user=self.user, dbname=self.dbname)

    def environment(self) -> dict[str, str]:
        """The variables that libpq and most programs read."""
        variables = {
            "DATABASE_URL": self.uri,
            "PGHOST": self.host,
            "PGPORT": str(self.port),
            "PGUSER": self.user,
            "PGDATABASE": self.dbname,
        }
        if self.password is not None:
            variables["PGPASSWORD"] = self.password
        return variables


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialInfo:
    """What a URL given by a user says; None is what it leaves open."""

    host: str | None = None
    port: int | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    dbname: str | None = None


def redact(uri: str) -> str:
    """The URL with its password replaced, for messages."""
    uri = re.sub(r"(//[^:/@?]*:)[^?]*@", r"\1***@", uri)
    return re.sub(r"(password=)[^&\s]*", r"\1***", uri)


def parse(uri: str, source: str = "") -> PartialInfo:
    """Read a URL.

    Args:
        source: where it comes from, such as the name of a variable, for messages.

    Raises:
        OptionError: it is not a PostgreSQL URL, or says what pgtemp cannot do.
    """
    shown = f"{source} {redact(uri)!r}".lstrip()
    if not uri.startswith(("postgresql://", "postgres://")):
        raise OptionError(f"{shown} is not a PostgreSQL URI", remedy=_EXAMPLE)
    try:
        said = conninfo_to_dict(uri)
    except ProgrammingError as error:
        # libpq quotes the URI, and with it the password
        reason = str(error).strip().replace(uri, redact(uri))
        raise OptionError(f"{shown} is not a PostgreSQL URI: {reason}", remedy=_EXAMPLE) from None
    port = None
    if (given := said.get("port")) is not None:
        port = int(given) if str(given).isdecimal() else 0
        if not 1 <= port <= 65535:
            raise OptionError(f"{shown}: {given!r} is not a port", remedy=_EXAMPLE)

    def text(name: str) -> str | None:
        return str(said[name]) if said.get(name) not in (None, "") else None

    return PartialInfo(
        host=text("host"),
        port=port,
        user=text("user"),
        password=text("password"),
        dbname=text("dbname"),
    )
