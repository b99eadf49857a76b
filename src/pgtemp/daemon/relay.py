"""Bytes between two sockets: both directions, half-close, back pressure, bounded memory.

The loop's transports hold what a slow reader has not taken yet. While it keeps up, its bytes go to
its socket directly, which spares the relay a tenth of its time.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import cast

from pgtemp.wire.messages import TERMINATE, ProtocolError
from pgtemp.wire.tls import Tls

_log = logging.getLogger("pgtemp.daemon")

# Bytes asyncio may hold for a slow reader before the other side is told to wait.
HIGH_WATER = 256 * 1024
_DRAIN_SECONDS = 5.0
_FLUSH_SECONDS = 30.0  # for who does not read what was said last
_LAST = 1024  # bytes that are remembered of what came last
_PIECES = 64  # of which that is kept, before they are put together


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
        self._socket = -1  # the transport's descriptor, where bytes may be written to it directly
        self.listen: Callable[[bytes], None] | None = None
        self.inspect: Callable[[bytes], bytes] | None = None  # returns what may be passed on
        self.at_end: Callable[[], object] | None = None  # when its end was passed on
        self._pieces: list[bytes] = []  # what came last, put together when somebody asks
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
        transport = self.transport
        if self._finished or transport.is_closing():
            return
        self.sent += len(data)
        if self._tls is not None:
            data = self._tls.encrypt(data)
        if self._socket >= 0 and not transport.get_write_buffer_size():
            try:
                written = os.write(self._socket, data)
            except OSError:  # it is full, or gone: the transport knows what to do then
                written = 0
            if written == len(data):
                return
            data = data[written:]
        transport.write(data)

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
        if not peer.transport.is_closing():
            peer._socket = peer.transport.get_extra_info("socket").fileno()
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
        self.at_end = None
        self.listen = None
        self.inspect = None
        self._go_on()

    @property
    def last(self) -> bytes:
        """What came last."""
        return b"".join(self._pieces)[-_LAST:]

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
            with suppress(OSError):  # of asyncio's own loop, which has not seen a reset yet
                self.transport.write_eof()

    def close(self) -> None:
        """Flush, and close; who does not take what is left gets no more of it after a while."""
        if self._tls is not None:
            self.finish()
        if self.transport.get_write_buffer_size() and not self.transport.is_closing():
            loop = asyncio.get_running_loop()
            loop.call_later(_FLUSH_SECONDS, self.transport.abort)
        self.transport.close()

    def abort(self) -> None:
        """Close, whatever is still to be written."""
        self.transport.abort()

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
        if len(data) >= _LAST:
            self._pieces = [data[-_LAST:]]
        else:
            self._pieces.append(data)
            if len(self._pieces) > _PIECES:
                self._pieces = [self.last]
        if self._peer is None:
            self._arrived += data
            self._news.set()
            if len(self._arrived) > HIGH_WATER:  # until somebody is there to take it
                self.transport.pause_reading()
            return
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
            if self._peer.listen is None:
                self._peer.close()
            else:
                self._peer.finish()  # it is still to say whether it lets the client in

    def pause_writing(self) -> None:
        if self._peer is not None:
            self._peer.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._peer is not None:
            self._peer.transport.resume_reading()

    def _decrypt(self, tls: Tls, data: bytes) -> bytes:
        broken = False
        try:
            data = tls.receive(data)
        except ProtocolError as error:
            _log.info("lost a client: %s", error)
            data, broken = b"", True
        if not self._finished and not self.transport.is_closing() and (answer := tls.take()):
            self.transport.write(answer)
        if broken:
            self.finish()  # it can be told nothing more
        if tls.ended and not self._ended:
            # What is in `data` came before it.
            asyncio.get_running_loop().call_soon(self.eof_received)
        return data

    def _pass_on(self, data: bytes) -> None:
        assert self._peer is not None
        self.received += len(data)
        if self.inspect is not None:
            data = self.inspect(data)
        self._peer.write(data)
        if self.listen is not None:  # while the peer is at work
            self.listen(data)

    def _pass_on_end(self) -> None:
        assert self._peer is not None
        if self._passes_end:
            self._peer.finish()
            if self.at_end is not None:
                self.at_end()


async def relay(client: Endpoint, server: Endpoint) -> None:
    """Pass bytes both ways until the server has said its last, or the client is gone."""
    client.join(server, end=True)
    server.join(client, end=False)
    try:
        await server.ended()
    finally:
        client.part()
        server.part()
