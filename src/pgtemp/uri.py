"""Connection information: immutable, with conversions to a URL, libpq keywords and environment.

libpq's own parser, called through psycopg, reads URLs (PostgreSQL docs, "Connection Strings"). A
password appears only in the values that are documented to contain it, never in a repr.
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
    """How to connect to a database. `host` may be the directory of the server's unix socket."""

    host: str
    port: int
    user: str
    password: str | None = field(default=None, repr=False)
    dbname: str

    @property
    def uri(self) -> str:
        """The URL of the database, with the password, as libpq and most drivers accept it."""
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
        """libpq's keywords and values, without the password: safe on a command line."""
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
    """The parts of a URL given by a user; None for each part that the URL does not specify."""

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
    """Parse a URL.

    Args:
        source: the origin of the URL, such as the name of a variable; used in error messages.

    Raises:
        OptionError: the text is not a PostgreSQL URL, or contains a value that is not valid.
    """
    shown = f"{source} {redact(uri)!r}".lstrip()
    if not uri.startswith(("postgresql://", "postgres://")):
        raise OptionError(f"{shown} is not a PostgreSQL URI", remedy=_EXAMPLE)
    try:
        parameters = conninfo_to_dict(uri)
    except ProgrammingError as error:
        # libpq quotes the URI, including the password
        reason = str(error).strip().replace(uri, redact(uri))
        raise OptionError(f"{shown} is not a PostgreSQL URI: {reason}", remedy=_EXAMPLE) from None
    port = None
    if (given := parameters.get("port")) is not None:
        port = int(given) if str(given).isdecimal() else 0
        if not 1 <= port <= 65535:
            raise OptionError(f"{shown}: {given!r} is not a port", remedy=_EXAMPLE)

    def text(name: str) -> str | None:
        value = parameters.get(name)
        return str(value) if value not in (None, "") else None

    return PartialInfo(
        host=text("host"),
        port=port,
        user=text("user"),
        password=text("password"),
        dbname=text("dbname"),
    )
