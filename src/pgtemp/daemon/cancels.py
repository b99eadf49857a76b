"""Route a CancelRequest to the backend that owns the key.

Keys are learned from each server's BackendKeyData. The canceller's connection is closed only after
the backend's side has closed, else a cancel could hit the query after the one it was meant for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pgtemp.daemon.relay import Endpoint
from pgtemp.host.peer_credentials import check_listener, refuse_descriptors
from pgtemp.wire.messages import cancel_request

_SECONDS = 10.0


class Cancels:
    """Which server's socket a cancel key belongs to."""

    def __init__(self) -> None:
        self._sockets: dict[bytes, tuple[str, int]] = {}

    @contextmanager
    def registered(self, key: bytes, socket: str, uid: int) -> Iterator[None]:
        """The key leads to the server for as long as the block lasts.

        Args:
            socket: the path of the server's socket.
            uid: the user that the server runs as.
        """
        entry = self._sockets[key] = socket, uid
        try:
            yield
        finally:  # two servers may have given out the same key
            if self._sockets.get(key) is entry:
                del self._sockets[key]

    async def route(self, key: bytes) -> bool:
        """Pass a cancel on, and wait until it was taken; False for a key that nobody has."""
        found = self._sockets.get(key)
        if found is None:
            return False
        socket, uid = found
        loop = asyncio.get_running_loop()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(_SECONDS):
                _, server = await loop.create_unix_connection(Endpoint, socket)
                try:
                    connected = server.transport.get_extra_info("socket")
                    refuse_descriptors(connected)
                    check_listener(connected, uid)
                    server.write(cancel_request(key))
                    while await server.read():
                        pass
                finally:
                    server.close()
        return True
