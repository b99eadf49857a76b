"""One client from accept to release.

A lease starts only after a complete, valid StartupMessage has arrived, so a probe, a port scan or a
cancel request uses no server. An allocation whose client sent no message serves the next client.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from typing import Any

from pgtemp.allocation.isolation import DatabaseRequest, Isolation
from pgtemp.daemon import database_request, hangups
from pgtemp.daemon.backend import Backend, connect
from pgtemp.daemon.cancels import Cancels
from pgtemp.daemon.client_limits import MORE_FILES, ClientLimits
from pgtemp.daemon.conversation import Conversation, walsender_inspection
from pgtemp.daemon.error_responses import RefusedError, UnreachableError, refusal
from pgtemp.daemon.lease import Lease
from pgtemp.daemon.lease_manager import Leases
from pgtemp.daemon.listeners import Listener
from pgtemp.daemon.relay import Endpoint
from pgtemp.errors import PgTempError
from pgtemp.host.peer_credentials import Peers
from pgtemp.options.daemon import DaemonOptions
from pgtemp.sql.timeouts import NoAnswerError
from pgtemp.wire import replies
from pgtemp.wire.messages import ProtocolError
from pgtemp.wire.startup import Cancel, Negotiation, NoTlsError, Reply, Secure, Startup
from pgtemp.wire.tls import NO_TLS, Tls

_log = logging.getLogger("pgtemp.daemon")
STARTUP_SECONDS = 10.0  # for the whole start-up, not extended by a byte
_NOT_LISTENING = (
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOENT, errno.EPIPE, errno.ETIMEDOUT,
)  # fmt: skip
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
_PROBE = "pg_isready"


class Gateway:
    """Serves the clients of the daemon."""

    def __init__(
        self, isolation: Isolation, options: DaemonOptions, *, server_version: str
    ) -> None:
        self._isolation = isolation
        self._shares_servers = options.shares_servers
        self._literal = options.single
        self._server_version = server_version
        self._leases = Leases(isolation, options)
        self._cancels = Cancels()
        self.peers = Peers()
        self._clients: set[asyncio.Task[None]] = set()
        self._limits = ClientLimits(options.isolation)
        self._closing = False

    def endpoints(self, listener: Listener) -> Callable[[], Endpoint]:
        """Return the function that makes the endpoint of each client of this listener."""
        return lambda: Endpoint(lambda client: self._accept(client, listener))

    def _accept(self, client: Endpoint, listener: Listener) -> None:
        try:
            if self._closing:
                raise RefusedError("57P03", "pgtemp is shutting down")
            self._limits.enter(client, listener, len(self._clients))
        except RefusedError as why:
            _refuse(client, why)
            client.close()
            return
        task = asyncio.ensure_future(self._serve(client, listener))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)
        task.add_done_callback(lambda _: self._limits.leave(client))

    def facts(self) -> list[dict[str, Any]]:
        """Return the facts of each lease."""
        return self._leases.facts()

    async def close(self) -> None:
        """Disconnect all clients, and wait until their leases are released."""
        self._closing = True
        for task in self._clients:
            task.cancel()
        self._isolation.interrupt()  # after the tasks are cancelled, so that they do not retry
        await asyncio.gather(*self._clients, return_exceptions=True)
        await self._leases.close()
        self.peers.close()

    async def _serve(self, client: Endpoint, listener: Listener) -> None:
        try:
            startup = await self._start_up(client, listener)
            if startup is not None:
                with self._limits.served():
                    try:
                        await self._converse(client, startup, listener.by_password)
                    except UnreachableError as why:
                        _log.info("trying another server: %s", why)
                        await self._converse(client, startup, listener.by_password)
        except RefusedError as why:
            _refuse(client, why)
        except PgTempError as error:
            _refuse(client, refusal(error))
        except ProtocolError as error:
            _log.info("refused: %s", error)
            if error.sqlstate is not None:
                client.write(replies.fatal(error.sqlstate, str(error)))
        except asyncio.CancelledError:
            client.write(replies.fatal("57P01", "pgtemp is shutting down"))
            client.close()
            raise
        except OSError as error:
            _log.info("a client's connection failed: %s", error)
        except Exception as error:
            _log.exception("a client could not be served")
            client.write(replies.fatal("XX000", f"pgtemp failed: {error}"))
        await client.close_politely()

    async def _start_up(self, client: Endpoint, listener: Listener) -> Startup | None:
        """Return the client's StartupMessage; None if nothing is left to do for the client.

        Raises:
            RefusedError: the listener does not admit the client.
            ProtocolError: the client sent anything else than a start-up.
        """
        try:
            async with asyncio.timeout(STARTUP_SECONDS):
                return await self._negotiate(client, listener)
        except TimeoutError:
            _log.info("a client did not finish its start-up within %g s", STARTUP_SECONDS)
            return None
        finally:
            self._limits.starting -= 1

    async def _negotiate(self, client: Endpoint, listener: Listener) -> Startup | None:
        negotiation = Negotiation(tls=listener.tls is not None)
        while data := await client.read():
            negotiation.receive(data)
            try:
                event = negotiation.next_event()
            except NoTlsError:
                client.write(NO_TLS)
                raise
            if isinstance(event, Cancel):
                await self._cancels.route(event.key)
                break
            if isinstance(event, Startup):
                self._limits.check(client, listener)
                if client.refusal is not None:
                    raise client.refusal
                if event.parameters.get("application_name") != _PROBE:
                    return event
                client.write(
                    replies.greeting(event.version, event.parameters, self._server_version)
                )
                await client.read()
                break
            if isinstance(event, Reply):
                client.write(event.data)
                self._limits.check(client, listener)  # now, while the client processes the reply
            if isinstance(event, Secure):
                assert listener.tls is not None
                client.write(event.reply)
                client.encrypt(Tls(listener.tls, direct=not event.reply), event.arrived)
        return None

    async def _converse(self, client: Endpoint, startup: Startup, by_password: bool) -> None:
        """Get a lease for the client, connect to its database, and relay until one of them ends.

        Raises:
            PgTempError, RefusedError: the client gets no database; an UnreachableError if another
                server may serve it.
        """
        request = database_request.read(startup, literal=self._literal)
        inspection = walsender_inspection(startup) if self._shares_servers else None
        lease = await self._leases.enter(request, startup, client)
        try:
            backend = await self._connect(lease, request, startup, by_password)
            hangups.watch(client, backend.server, self.peers)
            talk = Conversation(client, backend, lease, startup, inspection, self._cancels)
            try:
                await talk.relay()
            except RefusedError as why:
                _refuse(client, why)
            finally:
                lease.used |= talk.used and not (by_password and backend.refused)
                backend.server.close()
            client.finish()  # before the release of the lease, which may take seconds
        finally:
            await self._leases.leave(lease, client)

    async def _connect(
        self, lease: Lease, request: DatabaseRequest, startup: Startup, by_password: bool
    ) -> Backend:
        """Return the lease's warm connection, else connect.

        Raises:
            PgTempError, RefusedError: the client gets no connection; an UnreachableError if the
                server cannot be reached, in which case no other client gets an allocation in it.
        """
        warm, lease.backend = lease.backend, None
        if warm is not None:
            return warm
        allocation = lease.allocation
        try:
            return await connect(
                self._isolation, allocation, request, startup, by_password=by_password
            )
        except PgTempError as error:
            if not isinstance(error.__cause__, NoAnswerError):
                raise
            allocation.give_up()
            raise UnreachableError("57P03", error.cause, error.remedy) from error
        except OSError as error:
            message = f"the server cannot be reached: {error.strerror}"
            if error.errno in _NOT_LISTENING:
                allocation.give_up()
                raise UnreachableError("57P03", message, "connect again") from error
            hint = MORE_FILES if error.errno in _OUT_OF_FILES else "connect again"
            raise RefusedError("57P03", message, hint) from error


def _refuse(client: Endpoint, why: RefusedError) -> None:
    _log.info("refused: %s", why)
    client.write(why.reply)
