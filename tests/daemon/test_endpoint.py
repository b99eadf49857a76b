"""One end of a connection, on asyncio's own event loop and on uvloop."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable

import pytest
import trustme
import uvloop

from pgtemp.daemon.relay import Endpoint
from pgtemp.wire.tls import Tls

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


async def accepted() -> tuple[Endpoint, socket.socket]:
    """An endpoint, and a client that is connected to it."""
    arrived: asyncio.Future[Endpoint] = asyncio.get_running_loop().create_future()
    server = await asyncio.get_running_loop().create_server(
        lambda: Endpoint(arrived.set_result), "127.0.0.1", 0
    )
    client = socket.create_connection(server.sockets[0].getsockname())
    end = await arrived
    server.close()
    return end, client


@pytest.mark.parametrize("loop", LOOPS)
def test_closing_a_connection_that_was_just_reset(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """Closing politely raises no error if the peer has reset the connection."""

    async def part() -> None:
        end, client = await accepted()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        await end.close_politely()
        assert end.transport.is_closing()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(part())


@pytest.mark.parametrize("loop", LOOPS)
def test_a_message_before_the_tls_handshake_ends(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """A client that cannot decrypt the message yet gets only the end of the connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(context)

    async def part() -> None:
        end, client = await accepted()
        end.encrypt(Tls(context, direct=False), b"\x16\x03\x01")
        end.write(b"the daemon ends")
        end.close()
        client.setblocking(False)
        with client:
            assert await asyncio.get_running_loop().sock_recv(client, 1000) == b""

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(part())


@pytest.mark.parametrize("loop", LOOPS)
def test_only_inspected_bytes_are_passed_on(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """This holds for bytes that arrived before the two ends were joined, and for later ones."""

    async def part() -> None:
        (end, client), (peer, server) = await accepted(), await accepted()
        server.setblocking(False)
        client.sendall(b"sEcRet ")
        while not end._arrived:
            await asyncio.sleep(0)
        observed: list[bytes] = []
        end.inspect, end.observe = bytes.lower, observed.append
        end.join(peer, eof=True)
        client.sendall(b"WORDS")
        client.close()
        arrived = b""
        while data := await asyncio.get_running_loop().sock_recv(server, 1000):
            arrived += data
        for one in (end, peer, server):
            one.close()
        assert arrived == b"secret words" == b"".join(observed)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(part())
