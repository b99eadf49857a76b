"""One server for everybody."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future

from pgtemp.allocation.allocation import Place
from pgtemp.allocation.isolation import Wish
from pgtemp.allocation.persisted import Note, try_note
from pgtemp.server.postmaster import Cluster
from pgtemp.sql import dump_restore, server_setup
from pgtemp.sql.server_setup import Plan


class Together:
    """One server for everybody: names are used as they stand in it."""

    def __init__(self, plan: Plan, announce: Callable[[str], None], attributes: str) -> None:
        self._plan = plan
        self._announce = announce
        self._attributes = attributes
        self.pillar: Cluster | None = None
        self._furnishing = threading.Lock()

    def open(self) -> None:
        self.pillar = server_setup.provision(self._plan, None)

    def share(self, wish: Wish) -> Hashable:
        return None

    def knows(self, wish: Wish) -> bool:
        return True

    def check(self, wish: Wish) -> None:
        """A database that is not there is the client's to make."""

    def kind(self, wish: Wish) -> Hashable:
        return None

    def claim(self, wish: Wish) -> Future[Place]:
        claimed: Future[Place] = Future()
        assert self.pillar is not None
        claimed.set_result(Place(self.pillar, wish.dbname))
        return claimed

    def furnished(self, place: Place, wish: Wish) -> str | None:
        return None

    def furnish(self, place: Place, wish: Wish) -> str:
        """Make the user."""
        if wish.user not in self._plan.users:
            with self._furnishing:
                server_setup.admit(place.cluster, self._plan, wish.user, self._attributes, None)
        return wish.dbname

    def release(self, place: Place, wish: Wish, *, used: bool) -> None:
        """It goes on."""

    def interrupt(self) -> None:
        options = self._plan.options
        if self.pillar is None:
            pass
        elif options.dump is None and not options.persist:
            self.pillar.abandon()
        else:
            self.pillar.unblock()

    def close(self) -> None:
        """End the server. Raises TransferError where the dump of it failed."""
        cluster, options = self.pillar, self._plan.options
        if cluster is None:
            return
        try:
            if options.dump is not None:
                info = server_setup.private_info(cluster, options.user, options.dbname)
                dump_restore.dump(self._plan.installation, info, options.dump)
        finally:
            if options.persist:
                try_note(cluster.home.path, Note(options.user, options.dbname))
            cluster.stop()
            if options.persist:
                self._announce(f"kept {cluster.home.path}")
