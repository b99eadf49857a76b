"""The daemon's connection to a backend: one database, logged in with the client's parameters."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from dataclasses import dataclass, field

from pgtemp.allocation.allocation import Allocation
from pgtemp.allocation.isolation import DatabaseRequest, Isolation
from pgtemp.daemon.logins import Login
from pgtemp.daemon.relay import Endpoint
from pgtemp.daemon.server_threads import in_turn
from pgtemp.errors import ClusterError
from pgtemp.host.peer_credentials import check_listener, refuse_descriptors
from pgtemp.wire.messages import FORGET, TERMINATE, Frames, startup_message
from pgtemp.wire.replies import ServerStart
from pgtemp.wire.startup import Startup, check_length

_QUEUE_SECONDS = 0.01
_SASL = (10).to_bytes(4, "big")
_BEFORE_PASSWORD_REQUEST = (b"N", b"v")  # NoticeResponse, NegotiateProtocolVersion
_MAX_GREETING = 64 * 1024  # bytes that are stored until a client takes the connection
# The buffer must hold one read of the relay while the server processes the previous one; otherwise
# COPY into a database takes the relay 1.5 times as long. A unix socket's buffer does not grow by
# itself.
_SEND_BUFFER = 1024 * 1024


@dataclass(slots=True)
class Backend:
    """A connection to a server.

    Attributes:
        login: the state of the login, with the cancel key.
        greeting: the server's messages that are still to be sent to the client.
    """

    server: Endpoint
    login: ServerStart = field(default_factory=ServerStart)
    greeting: bytes = b""

    @property
    def refused(self) -> bool:
        """Whether the login has failed."""
        return self.login.failed or (self.server.at_eof and not self.login.done)

    def close(self) -> None:
        """Close the connection; send Terminate first if the login is complete."""
        if self.login.done:
            self.server.write(TERMINATE)
        self.server.close()

    async def read(self, observer: ServerStart) -> bytes:
        """Read from the server, and append to the greeting; b"" at end of file."""
        data = await self.server.read()
        self.greeting += data
        observer.feed(data)
        return data

    async def read_until_done(self, observer: ServerStart) -> bool:
        """Read until the server is ready for a query; False if it refuses, or sends too much."""
        while not observer.done and len(self.greeting) <= _MAX_GREETING:
            if not await self.read(observer):
                break
        return observer.ready


async def connect(
    isolation: Isolation,
    allocation: Allocation,
    request: DatabaseRequest,
    startup: Startup,
    *,
    by_password: bool = False,
    log_in: bool = False,
) -> Backend:
    """Prepare an allocation, connect to it, and send the client's parameters.

    Args:
        by_password: connect over TCP, where servers request a password, which the client must give.
        log_in: wait until the login is complete; otherwise only until the server answers.

    Raises:
        PgTempError: the allocation could not be prepared.
        OSError: the server cannot be reached; TimeoutError if it does not answer.
        ProtocolError: with the database's real name the packet is longer than servers accept.
        ClusterError: the server requests no password; no other client gets an allocation in it.
    """
    dbname = isolation.is_prepared(allocation, request)
    if dbname is None:
        dbname = await in_turn(allocation, lambda: isolation.prepare(allocation, request))
    packet = startup_message({**startup.parameters, "database": dbname}, startup.version)
    check_length(len(packet))
    async with Login(allocation):
        backend = Backend(await (_by_tcp if by_password else by_socket)(allocation, packet))
        try:
            if by_password:
                await _await_password_request(backend, allocation)
            elif log_in:
                await backend.read_until_done(backend.login)
            else:
                await backend.read(backend.login)
        except BaseException:
            backend.server.close()
            raise
    return backend


async def by_socket(allocation: Allocation, packet: bytes) -> Endpoint:
    """Connect to the server's unix socket, and send a packet. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)
        refuse_descriptors(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        path = allocation.socket
        # A unix socket connects at once, so the server starts to work before the event loop's next
        # iteration; unless the queue of its listening socket is full.
        while (code := connection.connect_ex(path)) == errno.EAGAIN:
            await asyncio.sleep(_QUEUE_SECONDS)
        if code:
            raise OSError(code, os.strerror(code))
        check_listener(connection, allocation.postmaster.spec.owner.uid)
        connection.sendall(packet)
        loop = asyncio.get_running_loop()
        return (await loop.create_unix_connection(Endpoint, sock=connection))[1]
    except BaseException:
        connection.close()
        raise


async def _by_tcp(allocation: Allocation, packet: bytes) -> Endpoint:
    loop = asyncio.get_running_loop()
    server = (await loop.create_connection(Endpoint, *allocation.address))[1]
    if not allocation.alive:  # another process may listen on its port by now
        server.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    server.write(packet)
    return server


async def _await_password_request(backend: Backend, allocation: Allocation) -> None:
    """Read from the server until it requests the password, refuses the client or disconnects.

    A client with a superuser's connection can change pg_hba.conf, so that no password is needed.

    Raises:
        ClusterError: the server lets the client in without a password.
    """
    frames = Frames(wanted=b"R", most=_MAX_GREETING)
    while data := await backend.read(backend.login):
        if (backend.login.done and not backend.login.failed) or (
            len(backend.greeting) > _MAX_GREETING
        ):
            raise _no_password_request(allocation)
        for kind, payload in frames.feed(data):
            if kind == b"E" or (kind == b"R" and payload[:4] == _SASL):
                return
            if kind not in _BEFORE_PASSWORD_REQUEST:
                raise _no_password_request(allocation)


def _no_password_request(allocation: Allocation) -> ClusterError:
    allocation.mark_unreachable()
    return ClusterError(
        "the server does not ask for the password, because its pg_hba.conf was changed",
        remedy="connect again, but not to a session in that server",
    )


async def plan_statement(backend: Backend, plan: bytes) -> bool:
    """Plan a statement, discard the plan, and return whether it could be planned.

    The first statement of a backend fills its caches, and reads the pages of catalogs into the
    shared buffers, which takes half a millisecond or more.

    Args:
        plan: protocol messages that plan the statement, as the unnamed statement and portal.
    """
    greeting = backend.greeting
    backend.server.write(plan + FORGET)
    planned = await backend.read_until_done(ServerStart())
    backend.greeting = greeting
    return planned
