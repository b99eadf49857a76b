"""What connections ask for, and the shape of the ways in which they are kept apart.

`per_lease.py` gives each lease a database or a server; `single_server.py` gives all leases one
server.
"""

from __future__ import annotations

from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from pgtemp.allocation.allocation import Allocation
from pgtemp.server.postmaster import Postmaster

TEMPLATE = "template"  # the session that is the template itself


@dataclass(frozen=True, slots=True)
class DatabaseRequest:
    """What a connection asks for.

    Attributes:
        dbname: names a template, or whatever the client calls its database.
        session: who else gets the same database; None is nobody.
    """

    user: str
    dbname: str
    session: str | None = None

    @property
    def edits(self) -> bool:
        """Whether it is the template itself that is wanted."""
        return self.session == TEMPLATE


class Isolation(Protocol):
    """How connections are kept apart."""

    def open(self) -> None:
        """Prepare; raises PgTempError where leases could not be given."""

    def share(self, request: DatabaseRequest) -> Hashable:
        """What is the same for all connections that share a lease; None is a lease of its own."""

    def knows(self, request: DatabaseRequest) -> bool:
        """Whether the name that is wished for needs no `check`."""

    def check(self, request: DatabaseRequest) -> None:
        """Raise NoDatabaseError where no lease can be had under that name."""

    def kind(self, request: DatabaseRequest) -> Hashable:
        """What is the same for all wishes that one place would do for; None is no other wish."""

    def claim(self, request: DatabaseRequest) -> Future[Allocation]: ...
    def is_prepared(self, allocation: Allocation, request: DatabaseRequest) -> str | None:
        """What `prepare` would return, where it has nothing to do."""

    def prepare(self, allocation: Allocation, request: DatabaseRequest) -> str:
        """Make ready for one more connection; the name of the database to log in to."""

    def release(self, allocation: Allocation, request: DatabaseRequest, *, used: bool) -> None: ...
    def interrupt(self) -> None:
        """End what calls wait for, since the daemon ends: servers of which nothing is kept.

        Of the others, let processes go on that were stopped. Does not wait. Only `release` and
        `close` may be called after it.
        """

    def close(self) -> None: ...

    @property
    def single_server(self) -> Postmaster | None:
        """The server without which nothing goes on."""
