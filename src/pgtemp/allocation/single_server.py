"""One server that all leases share; database names are used as given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future

from pgtemp.allocation.allocation import Allocation
from pgtemp.allocation.isolation import DatabaseRequest
from pgtemp.server.postmaster import Postmaster
from pgtemp.sql import dump_restore, server_setup
from pgtemp.sql.persisted_note import Note, try_note
from pgtemp.sql.server_setup import Plan


class SingleServer:
    """All leases share one server; a client gets the database whose name it requests."""

    def __init__(self, plan: Plan, announce: Callable[[str], None], attributes: str) -> None:
        self._plan = plan
        self._announce = announce
        self._attributes = attributes
        self.single_server: Postmaster | None = None
        self._preparing = threading.Lock()

    def open(self) -> None:
        self.single_server = server_setup.provision(self._plan, None)

    def share(self, request: DatabaseRequest) -> Hashable:
        return None

    def knows(self, request: DatabaseRequest) -> bool:
        return True

    def check(self, request: DatabaseRequest) -> None:
        """Accept any name; clients create their databases themselves."""

    def kind(self, request: DatabaseRequest) -> Hashable:
        return None

    def claim(self, request: DatabaseRequest) -> Future[Allocation]:
        claimed: Future[Allocation] = Future()
        assert self.single_server is not None
        claimed.set_result(Allocation(self.single_server, request.dbname))
        return claimed

    def is_prepared(self, allocation: Allocation, request: DatabaseRequest) -> str | None:
        return None

    def prepare(self, allocation: Allocation, request: DatabaseRequest) -> str:
        """Create the user."""
        if request.user not in self._plan.users:
            with self._preparing:
                server_setup.ensure_role(
                    allocation.postmaster, self._plan, request.user, self._attributes, None
                )
        return request.dbname

    def release(self, allocation: Allocation, request: DatabaseRequest, *, used: bool) -> None:
        """Do nothing: the server keeps running."""

    def interrupt(self) -> None:
        options = self._plan.options
        if self.single_server is None:
            pass
        elif options.dump is None and not options.persist:
            self.single_server.abandon()
        else:
            self.single_server.unblock()

    def close(self) -> None:
        """Stop the server. Raises TransferError if dumping its database failed."""
        postmaster, options = self.single_server, self._plan.options
        if postmaster is None:
            return
        try:
            if options.dump is not None:
                info = server_setup.private_info(postmaster, options.user, options.dbname)
                dump_restore.dump(self._plan.installation, info, options.dump)
        finally:
            if options.persist:
                try_note(postmaster.home.path, Note(options.user, options.dbname))
            postmaster.stop()
            if options.persist:
                self._announce(f"persisted {postmaster.home.path}")
