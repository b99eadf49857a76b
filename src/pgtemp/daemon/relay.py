"""Relay bytes between two sockets: both directions, half-close, back pressure, bounded memory.

The event loop's transports buffer the bytes that a slow reader has not read yet. While the buffer
is empty, the relay writes to the socket directly, which saves a tenth of its time.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import cast

from pgtemp.daemon.error_responses import RefusedError
from pgtemp.wire.messages import TERMINATE, ProtocolError
from pgtemp.wire.tls import Tls

_log = logging.getLogger("pgtemp.daemon")

# Bytes that asyncio may buffer for a slow reader before the relay pauses reading from the peer.
HIGH_WATER = 256 * 1024
_DRAIN_SECONDS = 5.0
_FLUSH_SECONDS = 30.0  # for a peer that does not read the last bytes
_LAST = 1024  # bytes received last that are stored
_PIECES = 64  # of those bytes, before they are joined


class Endpoint(asyncio.Protocol):
    """One socket.

    At first, `read` returns the bytes received; from `join` on, they are relayed to the peer.

    Attributes:
        observe: called with the bytes relayed from here to the peer; None for none.
        inspect: called with received bytes; returns the bytes that may be relayed.
        after_eof: called after the end of file was relayed to the peer.
        refusal: why the daemon stops relaying; the error for the client.
        at_eof: whether no more bytes can arrive here.
        received: the number of bytes received here and relayed.
        sent: the number of bytes written here.
    """

    def __init__(self, opened: Callable[[Endpoint], None] | None = None) -> None:
        self._opened = opened
        self._arrived = bytearray()
        self._waiter: asyncio.Future[None] | None = None  # of `_change`
        self.at_eof = False
        self._peer: Endpoint | None = None
        self._relays_eof = False
        self._finished = False
        self._tls: Tls | None = None
        self.observe: Callable[[bytes], None] | None = None
        self.inspect: Callable[[bytes], bytes] | None = None
        self.after_eof: Callable[[], object] | None = None
        self.refusal: RefusedError | None = None
        self._pieces: list[bytes] = []  # the bytes received last, joined in `last`
        self.received = 0
        self.sent = 0
        self.transport: asyncio.Transport

    async def read(self) -> bytes:
        """Return the bytes that have arrived, and wait for some; b"" at end of file."""
        while not self._arrived and not self.at_eof:
            await self._change()
        data = bytes(self._arrived)
        self._arrived.clear()
        self._resume_reading()
        return data

    async def _change(self) -> None:
        """Wait until bytes or the end of file arrive, or the peer is refused."""
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _resume_reading(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def write(self, data: bytes) -> None:
        transport = self.transport
        if self._finished or not data or transport.is_closing():
            return
        self.sent += len(data)
        if self._tls is not None:
            data = self._tls.encrypt(data)
        if not transport.get_write_buffer_size():
            try:
                written = os.write(self._socket, data)
            except OSError:  # the socket is full or closed, which the transport handles
                written = 0
            if written == len(data):
                return
            data = data[written:]
        transport.write(data)

    def encrypt(self, tls: Tls, arrived: bytes) -> None:
        """Use TLS from now on; `arrived` contains the bytes of TLS that have arrived already."""
        self._tls = tls
        if arrived:
            self.data_received(arrived)

    def join(self, peer: Endpoint, *, eof: bool) -> None:
        """Relay all bytes to the peer from now on, including those that have arrived already.

        Args:
            eof: relay the end of file too. If not, the caller may still write to the peer after it.
        """
        self._peer = peer
        self._relays_eof = eof
        if self._arrived:
            data = bytes(self._arrived)
            self._arrived.clear()
            self._resume_reading()
            self._relay(data)
        if self.at_eof:
            self._relay_eof()

    def detach(self) -> None:
        """Relay no more bytes, and nothing else that happens here, to the peer."""
        self._peer = None
        self.after_eof = None
        self.observe = None
        self.inspect = None
        self._resume_reading()

    @property
    def last(self) -> bytes:
        """The bytes received last."""
        return b"".join(self._pieces)[-_LAST:]

    @property
    def has_terminated(self) -> bool:
        """Whether a client has sent Terminate and end of file, so that its backend will exit."""
        return self.at_eof and self.last.endswith(TERMINATE)

    @property
    def has_finished(self) -> bool:
        """Whether a client has sent Terminate or end of file."""
        return self.at_eof or self.last.endswith(TERMINATE)

    def refuse(self, why: RefusedError) -> None:
        """Stop to relay to and from this client. The first reason is the one it gets."""
        if self.refusal is None:
            self.refusal = why
            if self._peer is not None:
                self._peer._wake()

    def finish(self) -> None:
        """Flush, and shut down the sending side."""
        if not self._finished and not self.transport.is_closing():
            self._finished = True
            if self._tls is not None:
                self.transport.write(self._tls.finish())
            with suppress(OSError):  # asyncio's own loop may not have noticed a reset yet
                self.transport.write_eof()

    def close(self) -> None:
        """Flush, and close; abort if the peer has not read the rest after _FLUSH_SECONDS."""
        if self._tls is not None:
            self.finish()
        if self.transport.get_write_buffer_size() and not self.transport.is_closing():
            loop = asyncio.get_running_loop()
            loop.call_later(_FLUSH_SECONDS, self.transport.abort)
        self.transport.close()

    def abort(self) -> None:
        """Close at once, and discard the bytes that are not written yet."""
        self.transport.abort()

    async def close_politely(self) -> None:
        """Flush, shut down the sending side, wait until the peer closes, then close.

        Closing a socket with unread bytes resets the connection, and the peer may lose the last
        message.
        """
        self.finish()
        if not self.at_eof and not self.transport.is_closing():
            with suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_SECONDS):
                    while await self.read():
                        pass
        self.close()

    # called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not instances of asyncio's classes.
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=HIGH_WATER)
        self._socket: int = transport.get_extra_info("socket").fileno()
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
            self._wake()
            if len(self._arrived) > HIGH_WATER:  # until `read` or `join` takes the bytes
                self.transport.pause_reading()
            return
        self._relay(data)

    def eof_received(self) -> bool:
        self.at_eof = True
        self._wake()
        if self._peer is not None:
            self._relay_eof()
        return True  # the other direction stays open

    def connection_lost(self, exc: Exception | None) -> None:
        self.at_eof = True
        self._wake()
        if self._peer is not None and self._relays_eof:
            if self._peer.observe is None:
                self._peer.close()
            else:
                self._peer.finish()  # the server has yet to accept or refuse the login

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
            _log.info("a client's connection failed: %s", error)
            data, broken = b"", True
        if not self._finished and not self.transport.is_closing() and (answer := tls.take()):
            self.transport.write(answer)
        if broken:
            self.finish()  # the client cannot read any more data
        if tls.ended and not self.at_eof:
            # Later, because the bytes in `data` arrived before it.
            asyncio.get_running_loop().call_soon(self.eof_received)
        return data

    def _relay(self, data: bytes) -> None:
        assert self._peer is not None
        self.received += len(data)
        if self.inspect is not None:
            data = self.inspect(data)
        self._peer.write(data)
        if self.observe is not None:  # after the write, while the peer processes the bytes
            self.observe(data)

    def _relay_eof(self) -> None:
        assert self._peer is not None
        if self._relays_eof:
            self._peer.finish()
            if self.after_eof is not None:
                self.after_eof()


async def relay(client: Endpoint, server: Endpoint) -> None:
    """Relay in both directions until the server sends no more, or the client is refused."""
    client.join(server, eof=True)
    server.join(client, eof=False)
    try:
        while not server.at_eof and client.refusal is None:
            await server._change()
    finally:
        client.detach()
        server.detach()
