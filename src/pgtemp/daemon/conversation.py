"""One client and its backend: the relayed bytes, and the information that the daemon reads in them.

The start of both directions shows the cancel key, whether the client uses its database, and its
first statement. Afterwards the bytes are relayed without being read, except those that a client
sends to a walsender of a shared server.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pgtemp.daemon import database_request
from pgtemp.daemon.backend import Backend
from pgtemp.daemon.cancels import Cancels
from pgtemp.daemon.error_responses import RefusedError, crashed
from pgtemp.daemon.lease import Lease
from pgtemp.daemon.relay import Endpoint, relay
from pgtemp.daemon.server_threads import in_turn
from pgtemp.wire import replication, replies
from pgtemp.wire.firststatement import FirstStatement
from pgtemp.wire.replication import Inspection
from pgtemp.wire.startup import Startup


def walsender_inspection(startup: Startup) -> Inspection | None:
    """Return the inspection of a client's messages, if it uses a walsender in a shared server.

    Raises:
        RefusedError: the client requests physical replication.
    """
    found = replication.inspection(startup.parameters)
    if found is not None and found.refused:
        raise _not_shared(found.refused)
    return found


@dataclass(eq=False, slots=True)
class Conversation:
    """The connection of a client that has a lease to its backend."""

    client: Endpoint
    backend: Backend
    lease: Lease
    startup: Startup
    inspection: Inspection | None
    cancels: Cancels
    _first_words: replies.ClientStart = field(default_factory=replies.ClientStart)
    _statement: FirstStatement = field(default_factory=FirstStatement)

    @property
    def used(self) -> bool:
        """Whether the client may have changed anything in its server."""
        return self._first_words.used or database_request.may_run_code(self.startup)

    async def relay(self) -> None:
        """Send the greeting to the client, and relay until the client, server or lease ends.

        Raises:
            RefusedError: the client was not the one that ended the connection.
        """
        client, server, login = self.client, self.backend.server, self.backend.login
        client.write(self.backend.greeting)
        client.observe, rest = self._observe_client, self.startup.rest
        if self.inspection is not None:
            client.inspect, rest = self._inspect, self._inspect(rest)
        server.write(rest)
        self._observe_client(rest)
        if login.done:
            self._register_key()
        else:
            server.observe = self._observe_login
        try:
            await relay(client, server)
        finally:
            if login.key is not None:
                self.cancels.remove(login.key, self.lease.allocation)
        if client.refusal is not None:
            raise client.refusal
        if not login.done and not client.transport.is_closing():
            raise RefusedError(
                "57P03", "the server closed the connection during the login", "connect again"
            )
        if not client.has_finished and replies.ended_by_crash(server.last):
            allocation = self.lease.allocation
            raise await in_turn(allocation, lambda: crashed(allocation.postmaster))

    def _observe_client(self, data: bytes) -> None:
        self._first_words.feed(data)
        self._statement.feed(data)
        if self._first_words.used and self._statement.done:
            self.client.observe = None
            if self.lease.kind is not None and self.lease.connections == 1:
                self.lease.kind.record(self._statement.plan)

    def _observe_login(self, data: bytes) -> None:
        server, login = self.backend.server, self.backend.login
        login.feed(data)
        if login.done:
            server.observe = None
            self._register_key()
            if self.client.transport.is_closing():
                server.transport.close()

    def _register_key(self) -> None:
        if self.backend.login.key is not None:
            self.cancels.add(self.backend.login.key, self.lease.allocation)

    def _inspect(self, data: bytes) -> bytes:
        assert self.inspection is not None
        data = self.inspection.feed(data)
        if self.inspection.refused:
            self.client.refuse(_not_shared(self.inspection.refused))
        return data


def _not_shared(command: str) -> RefusedError:
    return RefusedError(
        "0A000",
        f"{command} is not allowed in a shared server: it may read other clients' databases",
        "start pgtemp with --isolation cluster, which gives each client a server of its own",
    )
