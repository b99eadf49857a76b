"""Route a CancelRequest to the backend that owns the key.

The keys are read from each backend's BackendKeyData. The daemon closes the connection that sent the
CancelRequest only after the server has closed its side; otherwise a cancel could stop the query
after the intended one.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from pgtemp.allocation.allocation import Allocation
from pgtemp.daemon.backend import by_socket
from pgtemp.wire.messages import cancel_request

_log = logging.getLogger("pgtemp.daemon")
_SECONDS = 10.0


class Cancels:
    """The allocations by the cancel keys of their backends."""

    def __init__(self) -> None:
        self._allocations: dict[bytes, Allocation] = {}

    def add(self, key: bytes, allocation: Allocation) -> None:
        """Route the key to the server of an allocation."""
        self._allocations[key] = allocation

    def remove(self, key: bytes, allocation: Allocation) -> None:
        """Forget the key, unless another server has given out the same one."""
        if self._allocations.get(key) is allocation:
            del self._allocations[key]

    async def route(self, key: bytes) -> None:
        """Forward a CancelRequest, and wait until the server took it."""
        allocation = self._allocations.get(key)
        if allocation is None:
            _log.info("a cancel request with an unknown key")
            return
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(_SECONDS):
                server = await by_socket(allocation, cancel_request(key))
                try:
                    while await server.read():
                        pass
                finally:
                    server.close()
