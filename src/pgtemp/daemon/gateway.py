"""One client from accept to release.

Nothing is leased before a whole, valid StartupMessage has arrived, so a probe, a scan or a cancel
costs no server; and a server whose client left without a word serves the next.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from contextlib import ExitStack

from pgtemp.aio import whole
from pgtemp.daemon.cancels import Cancels
from pgtemp.daemon.relay import Endpoint, relay
from pgtemp.databases.isolation import Isolation, Lease
from pgtemp.errors import PgTempError
from pgtemp.host import ports
from pgtemp.wire import replies
from pgtemp.wire.messages import ProtocolError, startup_message
from pgtemp.wire.startup import Cancel, NeedMore, Negotiation, Reply, Startup

_log = logging.getLogger("pgtemp.daemon")
STARTUP_SECONDS = 10.0  # for the whole start-up, not extended by a byte
LEASE_SECONDS = 60.0
MAX_STARTING = 1000  # clients that have not said yet who they are
_PROBE = "pg_isready"


class Gateway:
    """What happens to each client of the daemon."""

    def __init__(self, isolation: Isolation, *, server_version: str, ttl: float | None) -> None:
        self._isolation = isolation
        self._server_version = server_version
        self._ttl = ttl
        self._cancels = Cancels()
        self._clients: set[asyncio.Task[None]] = set()
        self._starting = 0
        self._closing = False

    def accepted(self, client: Endpoint) -> None:
        """A client has connected."""
        if self._starting >= MAX_STARTING or self._closing:
            client.write(replies.fatal("53300", "too many clients are starting"))
            client.close()
            return
        task = asyncio.ensure_future(self._serve(client))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    async def close(self) -> None:
        """End all clients, and wait until their leases are released."""
        self._closing = True
        for task in self._clients:
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _serve(self, client: Endpoint) -> None:
        try:
            _no_delay(client)
            startup = await self._start_up(client)
            if startup is not None:
                await self._lease(client, startup)
        except _RefusedError as refusal:
            _log.info("refused: %s", refusal)
            client.write(refusal.reply)
        except ProtocolError as error:
            _log.info("refused: %s", error)
            if error.sqlstate is not None:
                client.write(replies.fatal(error.sqlstate, str(error)))
        except asyncio.CancelledError:
            client.write(replies.fatal("57P01", "pgtemp is shutting down"))
            client.close()
            raise
        except OSError as error:
            _log.info("lost a client: %s", error)
        except Exception as error:
            _log.exception("a client could not be served")
            client.write(replies.fatal("XX000", f"pgtemp failed: {error}"))
        await client.close_politely()

    async def _start_up(self, client: Endpoint) -> Startup | None:
        """Who wants what; None where that was all."""
        self._starting += 1
        try:
            async with asyncio.timeout(STARTUP_SECONDS):
                opening = await _negotiate(client)
                if isinstance(opening, Cancel):
                    if not await self._cancels.route(opening.key):
                        _log.info("a cancel request with a key that nobody has")
                    return None
                if opening is None:
                    return None
                _admit(client)
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
            self._starting -= 1

    async def _lease(self, client: Endpoint, startup: Startup) -> None:
        asked = time.perf_counter()
        lease = await self._claim(startup)
        waited = (time.perf_counter() - asked) * 1000
        server, first_words = Endpoint(), replies.ClientStart()
        try:
            await self._connect(client, startup, lease, server, first_words)
        finally:
            used = first_words.used
            _log.info(
                "lease %d: user %s database %s, waited %.1f ms, lived %.3f s, "
                "%d bytes in, %d bytes out%s",
                lease.number, lease.user, lease.dbname, waited,
                time.perf_counter() - asked, client.received, server.received,
                "" if used else ", unused",
            )  # fmt: skip
            await whole(lambda: self._isolation.release(lease, used=used))

    async def _claim(self, startup: Startup) -> Lease:
        claimed = self._isolation.claim()
        try:
            async with asyncio.timeout(LEASE_SECONDS):
                cluster = await asyncio.wrap_future(claimed)
            return await whole(
                lambda: self._isolation.furnish(cluster, startup.user, startup.dbname)
            )
        except TimeoutError:
            raise _RefusedError(
                "53300", f"no server became free within {LEASE_SECONDS:g} s", "try again later"
            ) from None
        except PgTempError as error:
            raise _RefusedError(
                "57P03", error.cause, error.remedy, "\n".join(error.details)
            ) from error

    async def _connect(
        self,
        client: Endpoint,
        startup: Startup,
        lease: Lease,
        server: Endpoint,
        first_words: replies.ClientStart,
    ) -> None:
        """Log the client in at its server, and relay until one of them ends."""
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: server, lease.socket)
        parameters = {**startup.parameters, "database": lease.dbname}
        server.write(startup_message(parameters, startup.version) + startup.rest)
        first_words.feed(startup.rest)
        with ExitStack() as until_the_end:
            login = replies.ServerStart()

            def learn(data: bytes) -> None:
                login.feed(data)
                if login.done:
                    server.listen = None
                    if login.key is not None:
                        until_the_end.enter_context(
                            self._cancels.registered(login.key, lease.socket)
                        )

            until_the_end.callback(server.close)
            client.listen, server.listen = first_words.feed, learn
            try:
                async with asyncio.timeout(self._ttl):
                    await relay(client, server)
            except TimeoutError:
                raise _RefusedError(
                    "57P05", f"the database's time is over (ttl={self._ttl:g} s)", ""
                ) from None


class _RefusedError(Exception):
    """A client that is told why it gets no database."""

    def __init__(self, sqlstate: str, message: str, hint: str, detail: str = "") -> None:
        super().__init__(message)
        self.reply = replies.fatal(sqlstate, message, hint=hint, detail=detail)


async def _negotiate(client: Endpoint) -> Startup | Cancel | None:
    negotiation = Negotiation()
    while data := await client.read():
        negotiation.receive(data)
        while not isinstance(event := negotiation.next_event(), NeedMore):
            if not isinstance(event, Reply):
                return event
            client.write(event.data)
    return None


def _admit(client: Endpoint) -> None:
    """On loopback TCP only the user who runs the daemon comes in, and root.

    Over trusted loopback any local user could run shell commands as the server's user, with
    COPY FROM PROGRAM. Through the unix socket the directory's mode says who.
    """
    peer = client.transport.get_extra_info("peername")
    ours = client.transport.get_extra_info("sockname")
    if not isinstance(peer, tuple) or not isinstance(ours, tuple) or not ports.TELLS_PEERS:
        return
    uid = ports.peer_uid((str(peer[0]), int(peer[1])), (str(ours[0]), int(ours[1])))
    if uid in (0, os.getuid()):
        return
    raise _RefusedError(
        "28000",
        f"pgtemp serves the user who runs it (uid {os.getuid()}), not uid {uid}",
        "start a pgtemp of your own, on another port",
    )


def _no_delay(client: Endpoint) -> None:
    raw = client.transport.get_extra_info("socket")
    if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
