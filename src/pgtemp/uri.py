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
_ENCODE = "write @, :, /, ? and # in a password as %40, %3A, %2F, %3F and %23"
_NOT_READABLE = "it is not a valid URI"
_NO_PORT = "the text after the host is not a port"
_SCHEME = re.compile(r"(?:jdbc:)?postgres(?:ql)?(?:\+\w+)?://", re.I)
# Parameters with which drivers and ORMs describe themselves, their pools and their default schema.
_OF_CLIENTS = re.compile(
    r"(schema|currentSchema|connection_limit|pool_timeout|socket_timeout|pgbouncer|"
    r"statement_cache_size|prepared_statement_cache_size|prepareThreshold|preferQueryMode|"
    r"reWriteBatchedInserts|ApplicationName|serverVersion|charset|encoding|pool_\w+|max_\w+|"
    r"sslaccept|sslidentity|sslpassword|ssl|stringtype|async_fallback|driver|uselibpqcompat)=",
    re.I,
)


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
    """The URL with its password replaced, for messages; it may replace more than the password."""
    uri = re.sub(r"(//[^:/@?]*:).*@", r"\1***@", uri)
    return re.sub(r"(pass(?:word|wd)?=)[^&\s]*", r"\1***", uri, flags=re.I)


def parse(uri: str, source: str = "") -> PartialInfo:
    """Parse a URL, also in a form for a driver (postgresql+asyncpg://, jdbc:postgresql://).

    Parameters of the query that only describe a client, such as connection_limit, are ignored.

    Args:
        source: the origin of the URL, such as the name of a variable; used in error messages.

    Raises:
        OptionError: the text is not a PostgreSQL URL, or contains a value that is not valid.
    """
    shown = f"{source} {redact(uri)!r}".lstrip()
    scheme = _SCHEME.match(uri)
    if scheme is None:
        raise OptionError(f"{shown} is not a PostgreSQL URI", remedy=_EXAMPLE)
    address, mark, query = uri[scheme.end() :].partition("?")
    pairs = [pair for pair in query.split("&") if pair and not _OF_CLIENTS.match(pair)]
    try:
        parameters = conninfo_to_dict(f"postgresql://{address}{mark}{'&'.join(pairs)}")
    except ProgrammingError as error:
        # libpq quotes what it could not read, which may be a part of the password.
        unknown = re.search(r'invalid URI query parameter: "(\w+)"', str(error))
        cause = f"the parameter {unknown[1]} is not known" if unknown else _NOT_READABLE
        remedy = f"remove it; {_EXAMPLE}" if unknown else f"{_ENCODE}; {_EXAMPLE}"
        raise OptionError(f"{shown}: {cause}", remedy=remedy) from None
    port = None
    if (given := parameters.get("port")) is not None:
        if "," in str(given) or "," in str(parameters.get("host", "")):
            raise OptionError(f"{shown} has several hosts", remedy=f"keep one; {_EXAMPLE}")
        port = int(given) if str(given).isdecimal() else 0
        if not 1 <= port <= 65535:
            if "@" in uri:  # the text may be a part of a password that contains a slash
                raise OptionError(f"{shown}: {_NO_PORT}", remedy=f"{_ENCODE}; {_EXAMPLE}")
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
