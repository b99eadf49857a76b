"""Route a CancelRequest to the backend that owns the key.

The keys are read from each backend's BackendKeyData. The daemon closes the connection that sent the
CancelRequest only after the server has closed its side; otherwise a cancel could stop the query
after the intended one.
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
    """The servers' sockets by cancel key."""

    def __init__(self) -> None:
        self._sockets: dict[bytes, tuple[str, int]] = {}

    @contextmanager
    def registered(self, key: bytes, socket: str, uid: int) -> Iterator[None]:
        """Route the key to the server while the block runs.

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
        """Forward a CancelRequest, and wait until the server took it; False for an unknown key."""
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
