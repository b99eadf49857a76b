"""Clients that are gone while their statement runs on.

Who says nothing more may still wait for an answer, so the end of a client's bytes ends nothing. But
a statement may run for hours, or wait for a lock, and hold a database for nobody. So as long as it
runs the kernel is asked whether somebody holds the other end. It has to be asked: a connection that
is closed looks like one that is half-closed, until something is written to it. Of a client on
another machine the kernel knows nothing: it is taken to be there.
"""

from __future__ import annotations

import asyncio
import select
import socket

from pgtemp.daemon.relay import Endpoint
from pgtemp.host import ports
from pgtemp.host.peer_credentials import TELLS_PEERS, Peers

_PAUSE = 0.5  # seconds; most backends end sooner than that after their client


def end_with(client: Endpoint, server: Endpoint, peers: Peers) -> None:
    """From now on the connection to the server is closed when nobody is there for its answer."""
    later = asyncio.get_running_loop().call_later
    client.at_end = lambda: later(_PAUSE, _look, client, server, peers)


def _look(client: Endpoint, server: Endpoint, peers: Peers) -> None:
    # No closure that knows itself: such a circle keeps both ends until the collector comes by.
    if server.over:
        return
    if _is_held(client, peers):
        asyncio.get_running_loop().call_later(_PAUSE, _look, client, server, peers)
    else:
        server.abort()


def _is_held(client: Endpoint, peers: Peers) -> bool:
    if client.transport.is_closing():
        return False
    ours = client.transport.get_extra_info("socket")
    if ours.family != socket.AF_UNIX:
        peer = client.transport.get_extra_info("peername")
        told = TELLS_PEERS and peer is not None and ports.is_loopback(peer[0])
        return not told or peers.is_held(ours)
    poll = select.poll()
    poll.register(ours.fileno(), 0)  # that both directions are shut is told unasked
    return not poll.poll(0)
