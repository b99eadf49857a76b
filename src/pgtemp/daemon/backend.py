"""The server's side of one client: a connection to a database, logged in as the client asked."""

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
_BEFORE_QUESTION = (b"N", b"v")  # NoticeResponse, NegotiateProtocolVersion
_MOST_GREETING = 64 * 1024  # bytes that are kept for a client who is not there yet
# What the relay reads at once must fit in while the server is at the last of it; else COPY into a
# database takes the relay half as long again. A unix socket's buffer does not grow by itself.
_SEND_BUFFER = 1024 * 1024


@dataclass(slots=True)
class Backend:
    """A connection to a server.

    Attributes:
        login: what the server has said so far; with the key that cancels.
        greeting: what it said while nobody was there to hear it.
    """

    server: Endpoint
    login: ServerStart
    greeting: bytes = b""

    @property
    def refused(self) -> bool:
        """Whether the server has not let the client in, and will not."""
        return self.login.failed or (self.server.over and not self.login.done)

    def close(self) -> None:
        """Say goodbye, where the login is over, and close."""
        if self.login.done:
            self.server.write(TERMINATE)
        self.server.close()


async def prepare(isolation: Isolation, allocation: Allocation, request: DatabaseRequest) -> str:
    """Make a place fit for who connects; the database's real name. Raises PgTempError."""
    dbname = isolation.is_prepared(allocation, request)
    if dbname is not None:
        return dbname
    return await in_turn(allocation, lambda: isolation.prepare(allocation, request))


async def connect(
    allocation: Allocation, startup: Startup, dbname: str, *, by_password: bool
) -> Backend:
    """Connect and send the client's parameters, rebuilt with the database's real name.

    Args:
        by_password: come by TCP, where servers ask for a password, which is the client's to say.

    Raises:
        OSError: the server cannot be reached; TimeoutError if it does not answer.
        ProtocolError: with that name the packet is longer than a server takes.
        ClusterError: it asks for no password; nobody else gets a place in it.
    """
    packet = startup_message({**startup.parameters, "database": dbname}, startup.version)
    check_length(len(packet))
    loop = asyncio.get_running_loop()
    if by_password:
        async with login(allocation):
            _, server = await loop.create_connection(Endpoint, *allocation.address)
            backend = Backend(server, ServerStart())
            try:
                if not allocation.alive:  # its port may be somebody else's by now
                    raise ConnectionRefusedError(
                        errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED)
                    )
                server.write(packet)
                await _await_question(backend, allocation)
            except BaseException:
                server.close()
                raise
        return backend
    raw = socket.socket(socket.AF_UNIX)
    try:
        raw.setblocking(False)
        refuse_descriptors(raw)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        # A unix socket connects at once, so the server is at work before the loop comes round.
        code = raw.connect_ex(allocation.socket)
        if code == errno.EAGAIN:  # the server's queue is full
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
    """Read what the server says, and keep it for the client; b"" at the end."""
    data = await backend.server.read()
    backend.greeting += data
    backend.login.feed(data)
    return data


async def _await_question(backend: Backend, allocation: Allocation) -> None:
    """Hear the server out until it asks for the password, refuses or ends.

    Whoever has a superuser's connection can have pg_hba.conf say that no password is needed.
    """
    frames = Frames(wanted=b"R", most=_MOST_GREETING)
    while data := await _read(backend):
        for kind, payload in frames.feed(data):
            if kind == b"E" or (kind == b"R" and payload[:4] == _SASL):
                return
            if kind not in _BEFORE_QUESTION:
                allocation.mark_unreachable()
                raise ClusterError(
                    "the server does not ask for the password, since its pg_hba.conf was changed",
                    remedy="connect again; not to a session whose pg_hba.conf it is",
                )


async def log_in(backend: Backend, allocation: Allocation) -> bool:
    """Hear the server out until the client could speak; False if it refused or said too much.

    Raises TimeoutError if it does not answer.
    """
    async with login(allocation):
        await _hear(backend, backend.login)
    return backend.login.done and not backend.login.failed


async def plan_ahead(backend: Backend, plan: bytes) -> bool:
    """Have a statement planned, and forgotten; whether it could be.

    The first statement fills the backend's caches, and brings the catalogs' pages into the shared
    buffers, which takes half a millisecond and more.

    Args:
        plan: messages that plan it, as the unnamed statement and portal.
    """
    greeting, planned = backend.greeting, ServerStart()
    backend.server.write(plan + FORGET)
    await _hear(backend, planned)
    backend.greeting = greeting
    return planned.done and not planned.failed


async def _hear(backend: Backend, heard: ServerStart) -> None:
    while not heard.done and len(backend.greeting) <= _MOST_GREETING:
        data = await backend.server.read()
        if not data:
            return
        heard.feed(data)
        backend.greeting += data
