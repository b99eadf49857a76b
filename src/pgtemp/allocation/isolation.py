"""Database requests, and the protocol of the ways to isolate connections from each other.

`per_lease.py` gives each lease its own database or server; in `single_server.py` all leases share
one server.
"""

from __future__ import annotations

from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from pgtemp.allocation.allocation import Allocation
from pgtemp.server.postmaster import Postmaster

TEMPLATE = "template"  # the name of the session that edits the template itself


@dataclass(frozen=True, slots=True)
class DatabaseRequest:
    """The database that a connection requests.

    Attributes:
        user: the role that the client logs in as.
        dbname: the name of a template, or any other name that the client chooses.
        session: connections that name the same session share a lease; None for a lease that is
            not shared.
    """

    user: str
    dbname: str
    session: str | None = None

    @property
    def edits(self) -> bool:
        """Whether the client requests the template itself, to edit it."""
        return self.session == TEMPLATE


class Isolation(Protocol):
    """How connections are isolated from each other."""

    def open(self) -> None:
        """Prepare for leases. Raises PgTempError if no lease could be created."""

    def share(self, request: DatabaseRequest) -> Hashable:
        """Return a key that is equal for all connections that share a lease.

        None means that the lease is not shared.
        """

    def knows(self, request: DatabaseRequest) -> bool:
        """Return whether the requested name needs no `check`."""

    def check(self, request: DatabaseRequest) -> None:
        """Raise NoDatabaseError if no lease is available under the requested name."""

    def kind(self, request: DatabaseRequest) -> Hashable:
        """Return a key that is equal for all requests that the same allocation could serve.

        None means that no other request could be served by it.
        """

    def claim(self, request: DatabaseRequest) -> Future[Allocation]: ...
    def is_prepared(self, allocation: Allocation, request: DatabaseRequest) -> str | None:
        """Return what `prepare` would return, if there is nothing to prepare; else None."""

    def prepare(self, allocation: Allocation, request: DatabaseRequest) -> str:
        """Prepare for one more connection and return the name of the database to log in to."""

    def release(self, allocation: Allocation, request: DatabaseRequest, *, used: bool) -> None: ...
    def interrupt(self) -> None:
        """Unblock all pending calls, because the daemon is shutting down.

        Servers whose data is no longer needed are stopped; in the others, processes that a client
        stopped (SIGSTOP) are continued. The method does not wait. Only `release` and `close` may be
        called after it.
        """

    def close(self) -> None: ...

    @property
    def single_server(self) -> Postmaster | None:
        """The only server, without which the daemon cannot continue; None if there are several."""
