"""The server's side of one client: a connection to a database, logged in as the client asked."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from dataclasses import dataclass

from pgtemp.daemon.relay import Endpoint
from pgtemp.databases.supply import Place
from pgtemp.wire.messages import TERMINATE, WARM_UP, startup_message
from pgtemp.wire.replies import ServerStart
from pgtemp.wire.startup import Startup, check_length

_QUEUE_SECONDS = 0.01
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

    def close(self) -> None:
        """Say goodbye, where the login is over, and close."""
        if self.login.done:
            self.server.write(TERMINATE)
        self.server.close()


async def connect(place: Place, startup: Startup, dbname: str, *, by_password: bool) -> Backend:
    """Connect and send the client's parameters, rebuilt with the database's real name.

    Args:
        by_password: come by TCP, where servers ask for a password, which is the client's to say.

    Raises:
        OSError: the server cannot be reached.
        ProtocolError: with that name the packet is longer than a server takes.
    """
    packet = startup_message({**startup.parameters, "database": dbname}, startup.version)
    check_length(len(packet))
    loop = asyncio.get_running_loop()
    if by_password:
        server = Endpoint()
        await loop.create_connection(lambda: server, *place.address)
        server.write(packet)
        return Backend(server, ServerStart())
    raw = socket.socket(socket.AF_UNIX)
    try:
        raw.setblocking(False)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        # A unix socket connects at once, so the server is at work before the loop comes round.
        while (code := raw.connect_ex(place.socket)) == errno.EAGAIN:
            await asyncio.sleep(_QUEUE_SECONDS)  # the server's queue is full
        if code:
            raise OSError(code, os.strerror(code))
        raw.sendall(packet)
        _, server = await loop.create_unix_connection(Endpoint, sock=raw)
    except BaseException:
        raw.close()
        raise
    return Backend(server, ServerStart())


async def log_in(backend: Backend) -> bool:
    """Hear the server out until the client could speak; False if it refused or said too much."""
    await _hear(backend, backend.login)
    if not backend.login.done or backend.login.failed:
        return False
    # A first statement fills the backend's caches of types, which takes a third of a millisecond.
    # Nothing is executed, and nothing stays but the caches.
    greeting, warmed = backend.greeting, ServerStart()
    backend.server.write(WARM_UP)
    await _hear(backend, warmed)
    backend.greeting = greeting
    return warmed.done and not warmed.failed


async def _hear(backend: Backend, heard: ServerStart) -> None:
    while not heard.done and len(backend.greeting) <= _MOST_GREETING:
        data = await backend.server.read()
        if not data:
            return
        heard.feed(data)
        backend.greeting += data
