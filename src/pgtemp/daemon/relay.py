"""Bytes between two sockets: both directions, half-close, back pressure, bounded memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from pgtemp.wire.messages import TERMINATE, ProtocolError
from pgtemp.wire.tls import Tls

_log = logging.getLogger("pgtemp.daemon")

# Bytes asyncio may hold for a slow reader before the other side is told to wait.
HIGH_WATER = 256 * 1024
_DRAIN_SECONDS = 5.0
_LAST = 1024  # bytes that are remembered of what came last


class Endpoint(asyncio.Protocol):
    """One socket. At first its bytes are read by awaiting; from `join` on they are passed on."""

    def __init__(self, opened: Callable[[Endpoint], None] | None = None) -> None:
        self._opened = opened
        self._arrived = bytearray()
        self._news = asyncio.Event()
        self._ended = False
        self._peer: Endpoint | None = None
        self._passes_end = False
        self._finished = False
        self._tls: Tls | None = None
        self.listen: Callable[[bytes], None] | None = None
        self.last = b""  # what came last
        self.received = 0  # bytes that were passed on
        self.sent = 0
        self.transport: asyncio.Transport

    async def read(self) -> bytes:
        """What has arrived; b"" at the end."""
        while not self._arrived and not self._ended:
            self._news.clear()
            await self._news.wait()
        data = bytes(self._arrived)
        self._arrived.clear()
        self._go_on()
        return data

    def _go_on(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def write(self, data: bytes) -> None:
        if not self._finished and not self.transport.is_closing():
            self.sent += len(data)
            self.transport.write(data if self._tls is None else self._tls.encrypt(data))

    def encrypt(self, tls: Tls, arrived: bytes) -> None:
        """Speak TLS from now on, of which some has arrived already."""
        self._tls = tls
        if arrived:
            self.data_received(arrived)

    def join(self, peer: Endpoint, *, end: bool) -> None:
        """Pass on everything from now on, beginning with what has arrived already.

        Args:
            end: also that nothing more comes from here. Where not, something is still to be said
                to the peer then.
        """
        self._peer = peer
        self._passes_end = end
        if self._arrived:
            data = bytes(self._arrived)
            self._arrived.clear()
            self._go_on()
            self._pass_on(data)
        if self._ended:
            self._pass_on_end()

    def part(self) -> None:
        """Pass on nothing more; what happens here no longer concerns the peer."""
        self._peer = None
        self._go_on()

    @property
    def left(self) -> bool:
        """Whether a client has said goodbye, so that its backend is about to end."""
        return self._ended and self.last.endswith(TERMINATE)

    @property
    def has_finished(self) -> bool:
        """Whether a client has said goodbye, or will say nothing more."""
        return self._ended or self.last.endswith(TERMINATE)

    @property
    def over(self) -> bool:
        """Whether nothing more can come from here."""
        return self._ended

    async def ended(self) -> None:
        """Wait until nothing more can come from here."""
        while not self._ended:
            self._news.clear()
            await self._news.wait()

    def finish(self) -> None:
        """Flush, and say that nothing more comes."""
        if not self._finished and not self.transport.is_closing():
            self._finished = True
            if self._tls is not None:
                self.transport.write(self._tls.finish())
            self.transport.write_eof()

    def close(self) -> None:
        if self._tls is not None:
            self.finish()
        self.transport.close()

    async def close_politely(self) -> None:
        """Flush, say that nothing more comes, let the peer read it, then close.

        A plain close while bytes are unread resets the connection, and the peer may lose the last
        message.
        """
        if not self.transport.is_closing():
            self.finish()
            try:
                async with asyncio.timeout(_DRAIN_SECONDS):
                    while await self.read():
                        pass
            except TimeoutError:
                pass
        self.close()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's classes
        self.transport.set_write_buffer_limits(high=HIGH_WATER)
        if self._opened is not None:
            self._opened(self)

    def data_received(self, data: bytes) -> None:
        if self._tls is not None:
            data = self._decrypt(self._tls, data)
            if not data:
                return
        self.last = data[-_LAST:] if len(data) >= _LAST else (self.last + data)[-_LAST:]
        if self._peer is None:
            self._arrived += data
            self._news.set()
            if len(self._arrived) > HIGH_WATER:  # until somebody is there to take it
                self.transport.pause_reading()
        else:
            self._pass_on(data)

    def eof_received(self) -> bool:
        self._ended = True
        self._news.set()
        if self._peer is not None:
            self._pass_on_end()
        return True  # the other direction goes on

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._news.set()
        if self._peer is not None and self._passes_end:
            self._peer.transport.close()

    def pause_writing(self) -> None:
        if self._peer is not None:
            self._peer.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._peer is not None:
            self._peer.transport.resume_reading()

    def _decrypt(self, tls: Tls, data: bytes) -> bytes:
        try:
            data = tls.receive(data)
        except ProtocolError as error:
            _log.info("lost a client: %s", error)
            data, tls.ended = b"", True
        if answer := tls.take():
            self.transport.write(answer)
        if tls.ended:
            # What is in `data` came before it.
            asyncio.get_running_loop().call_soon(self.eof_received)
        return data

    def _pass_on(self, data: bytes) -> None:
        assert self._peer is not None
        self.received += len(data)
        if self.listen is not None:
            self.listen(data)
        self._peer.write(data)

    def _pass_on_end(self) -> None:
        assert self._peer is not None
        if self._passes_end:
            self._peer.finish()


async def relay(client: Endpoint, server: Endpoint) -> None:
    """Pass bytes both ways until the server has said its last, or the client is gone."""
    client.join(server, end=True)
    server.join(client, end=False)
    try:
        await server.ended()
    finally:
        client.part()
        server.part()
