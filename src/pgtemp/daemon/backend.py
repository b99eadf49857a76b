"""The daemon's connection to a backend: one database, logged in with the client's parameters."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from dataclasses import dataclass

from pgtemp.allocation.allocation import Allocation
from pgtemp.allocation.isolation import DatabaseRequest, Isolation
from pgtemp.daemon.logins import login
from pgtemp.daemon.relay import Endpoint
from pgtemp.daemon.shares import in_turn
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
    login: ServerStart
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


async def prepare(isolation: Isolation, allocation: Allocation, request: DatabaseRequest) -> str:
    """Prepare an allocation for a client; return the database's real name. Raises PgTempError."""
    dbname = isolation.is_prepared(allocation, request)
    if dbname is not None:
        return dbname
    return await in_turn(allocation, lambda: isolation.prepare(allocation, request))


async def connect(
    allocation: Allocation, startup: Startup, dbname: str, *, by_password: bool
) -> Backend:
    """Connect and send the client's parameters, with the database's real name.

    Args:
        by_password: connect over TCP, where servers request a password, which the client must give.

    Raises:
        OSError: the server cannot be reached; TimeoutError if it does not answer.
        ProtocolError: with that name the packet is longer than servers accept.
        ClusterError: the server requests no password; no other client gets an allocation in it.
    """
    packet = startup_message({**startup.parameters, "database": dbname}, startup.version)
    check_length(len(packet))
    loop = asyncio.get_running_loop()
    if by_password:
        async with login(allocation):
            _, server = await loop.create_connection(Endpoint, *allocation.address)
            backend = Backend(server, ServerStart())
            try:
                if not allocation.alive:  # another process may listen on its port by now
                    raise ConnectionRefusedError(
                        errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)
                    )
                server.write(packet)
                await _await_password_request(backend, allocation)
            except BaseException:
                server.close()
                raise
        return backend
    raw = socket.socket(socket.AF_UNIX)
    try:
        raw.setblocking(False)
        refuse_descriptors(raw)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        # A unix socket connects at once, so the server starts to work before the event loop's next
        # iteration.
        code = raw.connect_ex(allocation.socket)
        if code == errno.EAGAIN:  # the queue of the server's listening socket is full
            async with login(allocation):
                while (code := raw.connect_ex(allocation.socket)) == errno.EAGAIN:
                    await asyncio.sleep(_QUEUE_SECONDS)
        if code:
            raise OSError(code, os.strerror(code))
        check_listener(raw, allocation.postmaster.spec.owner.uid)
        raw.sendall(packet)
        _, server = await loop.create_unix_connection(Endpoint, sock=raw)
    except BaseException:
        raw.close()
        raise
    backend = Backend(server, ServerStart())
    try:
        async with login(allocation):
            await _read(backend)
    except BaseException:
        server.close()
        raise
    return backend


async def _read(backend: Backend) -> bytes:
    """Read from the server, and append to the greeting; b"" at end of file."""
    data = await backend.server.read()
    backend.greeting += data
    backend.login.feed(data)
    return data


async def _await_password_request(backend: Backend, allocation: Allocation) -> None:
    """Read from the server until it requests the password, refuses the client or disconnects.

    A client with a superuser's connection can change pg_hba.conf, so that no password is needed.

    Raises:
        ClusterError: the server lets the client in without a password.
    """
    frames = Frames(wanted=b"R", most=_MAX_GREETING)
    while data := await _read(backend):
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


async def log_in(backend: Backend, allocation: Allocation) -> bool:
    """Read from the server until the login is complete.

    Returns:
        False if the server refused the login, or sent more than the greeting may hold.

    Raises:
        TimeoutError: the server does not answer.
    """
    async with login(allocation):
        await _read_until_done(backend, backend.login)
    return backend.login.ready


async def plan_statement(backend: Backend, plan: bytes) -> bool:
    """Plan a statement, discard the plan, and return whether it could be planned.

    The first statement of a backend fills its caches, and reads the pages of catalogs into the
    shared buffers, which takes half a millisecond or more.

    Args:
        plan: protocol messages that plan the statement, as the unnamed statement and portal.
    """
    greeting, planned = backend.greeting, ServerStart()
    backend.server.write(plan + FORGET)
    await _read_until_done(backend, planned)
    backend.greeting = greeting
    return planned.ready


async def _read_until_done(backend: Backend, observer: ServerStart) -> None:
    while not observer.done and len(backend.greeting) <= _MAX_GREETING:
        data = await backend.server.read()
        if not data:
            return
        observer.feed(data)
        backend.greeting += data
