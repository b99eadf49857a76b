"""One client from accept to release.

A lease starts only after a complete, valid StartupMessage has arrived, so a probe, a port scan or a
cancel request uses no server. An allocation whose client sent no message serves the next client.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from pgtemp.allocation.isolation import DatabaseRequest, Isolation
from pgtemp.daemon import database_request, hangups
from pgtemp.daemon.backend import Backend, connect, prepare
from pgtemp.daemon.cancels import Cancels
from pgtemp.daemon.client_limits import MORE_FILES, ClientLimits, Newcomer
from pgtemp.daemon.error_responses import RefusedError, UnreachableError, crashed, refusal
from pgtemp.daemon.lease import Lease
from pgtemp.daemon.lease_manager import Leases
from pgtemp.daemon.listeners import Listener
from pgtemp.daemon.relay import Endpoint, relay
from pgtemp.daemon.shares import in_turn
from pgtemp.errors import PgTempError
from pgtemp.host.peer_credentials import Peers
from pgtemp.options.daemon import DaemonOptions
from pgtemp.sql.answer_limits import NoAnswerError
from pgtemp.wire import replication, replies
from pgtemp.wire.firststatement import FirstStatement
from pgtemp.wire.messages import ProtocolError
from pgtemp.wire.replication import Inspection
from pgtemp.wire.startup import Cancel, Negotiation, NoTlsError, Reply, Secure, Startup
from pgtemp.wire.tls import NO_TLS, Tls

_log = logging.getLogger("pgtemp.daemon")
STARTUP_SECONDS = 10.0  # for the whole start-up, not extended by a byte
_NOT_LISTENING = (
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOENT, errno.EPIPE, errno.ETIMEDOUT,
)  # fmt: skip
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
_PROBE = "pg_isready"
# Parameters with which a login alone changes nothing in a server.
_USUAL = {
    "user", "database", "application_name", "client_encoding", "datestyle", "intervalstyle",
    "timezone", "extra_float_digits", "geqo", "search_path", "statement_timeout",
}  # fmt: skip


class Gateway:
    """Serves the clients of the daemon."""

    def __init__(
        self, isolation: Isolation, options: DaemonOptions, *, server_version: str
    ) -> None:
        self._isolation = isolation
        self._shares_servers = options.shares_servers
        self._server_version = server_version
        self._leases = Leases(isolation, options)
        self._cancels = Cancels()
        self.peers = Peers()
        self._clients: set[asyncio.Task[None]] = set()
        self._limits = ClientLimits(options.isolation)
        self._closing = False

    def listener(self, listener: Listener) -> Callable[[Endpoint], None]:
        """Return the function to call with each client that connects to this listener."""
        return lambda client: self._accept(client, listener)

    def _accept(self, client: Endpoint, listener: Listener) -> None:
        try:
            if self._closing:
                raise RefusedError("57P03", "pgtemp is shutting down")
            newcomer = self._limits.enter(lambda: listener.refusal(client), len(self._clients))
        except RefusedError as why:
            _refuse(client, why)
            client.close()
            return
        task = asyncio.ensure_future(self._serve(client, listener, newcomer))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)
        task.add_done_callback(lambda _: newcomer.leave())

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

    async def _serve(self, client: Endpoint, listener: Listener, newcomer: Newcomer) -> None:
        try:
            startup = await self._start_up(client, listener, newcomer)
            if startup is not None:
                with self._limits.served():
                    await self._lease(client, startup, listener)
        except RefusedError as why:
            _refuse(client, why)
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

    async def _start_up(
        self, client: Endpoint, listener: Listener, newcomer: Newcomer
    ) -> Startup | None:
        """Return the client's StartupMessage; None if nothing is left to do for the client."""
        try:
            async with asyncio.timeout(STARTUP_SECONDS):
                opening = await _negotiate(client, listener, newcomer)
                if isinstance(opening, Cancel):
                    if not await self._cancels.route(opening.key):
                        _log.info("a cancel request with an unknown key")
                    return None
                if opening is None:
                    return None
                if opening.parameters.get("application_name") == _PROBE:
                    client.write(
                        replies.greeting(opening.version, opening.parameters, self._server_version)
                    )
                    await client.read()
                    return None
                return opening
        except TimeoutError:
            _log.info("a client did not finish its start-up within %g s", STARTUP_SECONDS)
            return None
        finally:
            self._limits.starting -= 1

    async def _lease(self, client: Endpoint, startup: Startup, listener: Listener) -> None:
        try:
            request = database_request.read(startup)
        except PgTempError as error:
            raise refusal(error) from error
        inspection = self._inspection(startup)
        try:
            await self._serve_in_lease(client, request, startup, listener, inspection)
        except UnreachableError as why:
            _log.info("trying another server: %s", why)
            await self._serve_in_lease(client, request, startup, listener, inspection)

    async def _serve_in_lease(
        self,
        client: Endpoint,
        request: DatabaseRequest,
        startup: Startup,
        listener: Listener,
        inspection: Inspection | None,
    ) -> None:
        lease = await self._leases.enter(request, startup, client)
        first_words = replies.ClientStart()
        try:
            backend = await self._backend(lease, request, startup, listener)
            try:
                await self._relay(client, request, startup, lease, backend, first_words, inspection)
            except RefusedError as why:
                _refuse(client, why)
            finally:
                used = first_words.used or _sets_more(startup)
                lease.used |= used and not (listener.by_password and backend.refused)
                backend.server.close()
            client.finish()  # before the release of the lease, which may take seconds
        finally:
            await self._leases.leave(lease, client)

    async def _backend(
        self, lease: Lease, request: DatabaseRequest, startup: Startup, listener: Listener
    ) -> Backend:
        """Return the lease's warm connection, else connect.

        Raises:
            RefusedError: the client gets no connection; an UnreachableError if the server cannot be
                reached, in which case no other client gets an allocation in it.
        """
        warm, lease.backend = lease.backend, None
        if warm is not None:
            return warm
        try:
            dbname = await prepare(self._isolation, lease.allocation, request)
            return await connect(
                lease.allocation, startup, dbname, by_password=listener.by_password
            )
        except PgTempError as error:
            if isinstance(error.__cause__, NoAnswerError):
                lease.allocation.give_up()
                raise UnreachableError("57P03", error.cause, error.remedy) from error
            raise refusal(error) from error
        except OSError as error:
            message = f"the server cannot be reached: {error.strerror}"
            if error.errno in _NOT_LISTENING:
                lease.allocation.give_up()
                raise UnreachableError("57P03", message, "connect again") from error
            hint = MORE_FILES if error.errno in _OUT_OF_FILES else "connect again"
            raise RefusedError("57P03", message, hint) from error

    def _inspection(self, startup: Startup) -> Inspection | None:
        """Return the inspection of a client's messages, if it uses a walsender in a shared server.

        Raises:
            RefusedError: the client requests physical replication.
        """
        if not self._shares_servers:
            return None
        inspection = replication.inspection(startup.parameters)
        if inspection is not None and inspection.refused:
            raise _not_shared(inspection.refused)
        return inspection

    async def _relay(
        self,
        client: Endpoint,
        request: DatabaseRequest,
        startup: Startup,
        lease: Lease,
        backend: Backend,
        first_words: replies.ClientStart,
        inspection: Inspection | None,
    ) -> None:
        """Send the greeting to the client, and relay until the client, server or lease ends.

        Raises:
            RefusedError: the client was not the one that ended the connection.
        """
        server, login, statement = backend.server, backend.login, FirstStatement()
        socket, uid = lease.allocation.socket, lease.allocation.postmaster.spec.owner.uid
        refused: asyncio.Future[RefusedError] = asyncio.get_running_loop().create_future()
        client.write(backend.greeting)
        with ExitStack() as until_the_end:

            def register() -> None:
                if login.key is not None:
                    until_the_end.enter_context(self._cancels.registered(login.key, socket, uid))

            def observe_client(data: bytes) -> None:
                first_words.feed(data)
                statement.feed(data)
                if first_words.used and statement.done:
                    client.observe = None
                    self._leases.record(lease, request, startup, statement.plan)

            def observe_login(data: bytes) -> None:
                login.feed(data)
                if login.done:
                    server.observe = None
                    register()
                    if client.transport.is_closing():
                        server.transport.close()

            def inspect(data: bytes) -> bytes:
                assert inspection is not None
                data = inspection.feed(data)
                if inspection.refused and not refused.done():
                    refused.set_result(_not_shared(inspection.refused))
                return data

            client.observe, rest = observe_client, startup.rest
            if inspection is not None:
                client.inspect, rest = inspect, inspect(rest)
            server.write(rest)
            observe_client(rest)
            if login.done:
                register()
            else:
                server.observe = observe_login
            hangups.watch(client, server, self.peers)
            relaying = asyncio.ensure_future(relay(client, server))
            try:
                ends: set[asyncio.Future[Any]] = {relaying, lease.expired, refused}
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                relaying.cancel()
            if refused.done():
                raise refused.result()
            if not relaying.done() and lease.expired.done():
                raise lease.expired.result()
            if not login.done and not client.transport.is_closing():
                raise RefusedError(
                    "57P03", "the server closed the connection during the login", "connect again"
                )
            if client.has_finished:
                return
            if replies.ended_by_crash(server.last):
                raise await in_turn(lease.allocation, lambda: crashed(lease.allocation.postmaster))


def _sets_more(startup: Startup) -> bool:
    """Whether a login has settings that may run code, such as session_preload_libraries."""
    return not {name.lower() for name in startup.parameters} <= _USUAL


def _not_shared(command: str) -> RefusedError:
    return RefusedError(
        "0A000",
        f"{command} is not allowed in a shared server: it may read other clients' databases",
        "start pgtemp with --isolation cluster, which gives each client a server of its own",
    )


def _refuse(client: Endpoint, why: RefusedError) -> None:
    _log.info("refused: %s", why)
    client.write(why.reply)


async def _negotiate(
    client: Endpoint, listener: Listener, newcomer: Newcomer
) -> Startup | Cancel | None:
    negotiation = Negotiation(tls=listener.tls is not None)
    while data := await client.read():
        negotiation.receive(data)
        try:
            event = negotiation.next_event()
        except NoTlsError:
            client.write(NO_TLS)
            raise
        if isinstance(event, Cancel):
            return event
        if isinstance(event, Startup):
            if (why := newcomer.refusal) is not None:
                raise why
            return event
        if isinstance(event, Reply):
            client.write(event.data)
            _ = newcomer.refusal  # check now, while the client processes the reply
        if isinstance(event, Secure):
            assert listener.tls is not None
            client.write(event.reply)
            client.encrypt(Tls(listener.tls, direct=not event.reply), event.arrived)
    return None
