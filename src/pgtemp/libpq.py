"""libpq's environment variables, on which connections to pgtemp's servers must not depend.

A variable such as PGHOSTADDR or PGSSLMODE, set for another server, would redirect a connection to
that server, or require features that pgtemp's servers lack. libpq itself lists its variables, so
pgtemp also ignores those of later versions. Only variables that describe the client apply.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any, TypeVar

import psycopg
from psycopg import pq

from pgtemp.uri import ConnectionInfo

# Parameters that describe the client rather than the server; a test may set these.
_OF_THE_CLIENT = ("application_name", "client_encoding", "options", "connect_timeout")
_ALWAYS_GIVEN = ("host", "port", "user", "password", "dbname")
# Values that have the effect of an unset parameter, if "" does not have it.
_UNSET = {
    "require_auth": "none,password,md5,scram-sha-256",
    "sslcertmode": "allow",
    "min_protocol_version": "3.0",
    "max_protocol_version": "3.0",
}
# Not in libpq's list. Some drivers reject the last two.
_OTHER_VARIABLES = ("PGSERVICEFILE", "PGREQUIRESSL", "PGREALM")
_SERVICE = "PGSERVICE"
C = TypeVar("C", bound=psycopg.Connection[Any])
A = TypeVar("A", bound=psycopg.AsyncConnection[Any])


@cache
def _variables() -> dict[str, tuple[str, str]]:
    """The variables to ignore, with the parameter of each and the value of an unset parameter."""
    found = {}
    for option in pq.Conninfo.get_defaults():
        keyword = option.keyword.decode()
        if option.envvar and keyword not in (*_OF_THE_CLIENT, *_ALWAYS_GIVEN):
            unset = option.compiled.decode() if option.compiled is not None else ""
            found[option.envvar.decode()] = keyword, _UNSET.get(keyword, unset)
    return found


def parameters() -> dict[str, str]:
    """Return the parameters that make a connection independent of the variables that are set.

    The caller also has to give the host, port, user, password and database.
    """
    return {
        keyword: unset
        for variable, (keyword, unset) in _variables().items()
        if variable in os.environ and variable != _SERVICE
    }


def of_the_client(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a connection to another server that also apply to pgtemp's."""
    ignored = {keyword for keyword, _ in _variables().values()}
    return {name: value for name, value in given.items() if name not in ignored}


def arguments(info: ConnectionInfo, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of psycopg's `connect` for a database.

    Args:
        given: arguments of the caller, which take precedence.
    """
    return {**parameters(), **asdict(info), **given}


def connect(kind: type[C], info: ConnectionInfo, given: Mapping[str, Any]) -> C:
    """Connect to a database; see `arguments`. Raises psycopg's errors."""
    with _without_service:
        return kind.connect(**arguments(info, given))


async def aconnect(kind: type[A], info: ConnectionInfo, given: Mapping[str, Any]) -> A:
    """Connect to a database for asyncio; see `arguments`. Raises psycopg's errors."""
    with _without_service:
        return await kind.connect(**arguments(info, given))


class _WithoutService:
    """Hides the variable PGSERVICE in a block, because libpq fails if the service is not defined.

    It is the only variable that no parameter can replace. Blocks of several threads and tasks may
    overlap; the last one to end restores the variable.
    """

    def __init__(self) -> None:
        self._blocks = 0
        self._service: str | None = None
        self._changing = threading.Lock()

    def __enter__(self) -> None:
        with self._changing:
            self._blocks += 1
            if self._blocks == 1:
                self._service = os.environ.pop(_SERVICE, None)

    def __exit__(self, *_: object) -> None:
        with self._changing:
            self._blocks -= 1
            if self._blocks == 0 and self._service is not None:
                os.environ[_SERVICE] = self._service


_without_service = _WithoutService()


def child_environment(info: ConnectionInfo) -> dict[str, str]:
    """Return this process's environment, changed so that programs connect to a database.

    PGSSLMODE is set because some drivers require TLS by default, which servers do not offer.
    """
    ignored = {*_variables(), *_OTHER_VARIABLES}
    inherited = {name: value for name, value in os.environ.items() if name not in ignored}
    return {**inherited, **info.environment(), "PGSSLMODE": "disable"}
