"""The server's side of one client: a connection to a database, logged in as the client asked."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from pgtemp.daemon.relay import Endpoint
from pgtemp.databases.supply import Place
from pgtemp.wire.messages import TERMINATE, WARM_UP, startup_message
from pgtemp.wire.replies import ServerStart
from pgtemp.wire.startup import Startup


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


async def connect(place: Place, startup: Startup, dbname: str) -> Backend:
    """Connect and send the client's parameters, rebuilt with the database's real name.

    Raises:
        OSError: the server cannot be reached.
    """
    loop = asyncio.get_running_loop()
    _, server = await loop.create_unix_connection(Endpoint, place.socket)
    parameters = {**startup.parameters, "database": dbname}
    server.write(startup_message(parameters, startup.version))
    return Backend(server, ServerStart())


async def log_in(backend: Backend) -> bool:
    """Hear the server out until the client could speak; False where it refused."""
    await _hear(backend, backend.login)
    if backend.login.key is None:
        return False
    # A first statement fills the backend's caches of types, which takes a third of a millisecond.
    # Nothing is executed, and nothing stays but the caches.
    greeting, warmed = backend.greeting, ServerStart()
    backend.server.write(WARM_UP)
    await _hear(backend, warmed)
    backend.greeting = greeting
    return warmed.done and not warmed.failed


async def _hear(backend: Backend, heard: ServerStart) -> None:
    while not heard.done:
        data = await backend.server.read()
        if not data:
            return
        heard.feed(data)
        backend.greeting += data
