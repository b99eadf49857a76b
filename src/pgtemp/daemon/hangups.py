"""Detect clients that closed their connection while their statement still runs.

A client that has shut down its sending side may still wait for an answer, so end of file from the
client does not close the backend. But a statement may run for hours, or wait for a lock, and hold a
database that no client uses. So while it runs, the daemon queries the kernel whether a process
still holds the other end of the connection. It has to poll: a closed connection looks like a
half-closed one until something is written to it. The kernel has no information about a client on
another machine; such a client is assumed to be connected.
"""

from __future__ import annotations

import asyncio
import select
import socket

from pgtemp.daemon.relay import Endpoint
from pgtemp.host import ports
from pgtemp.host.peer_credentials import TELLS_PEERS, Peers

_PAUSE = 0.5  # seconds; most backends exit sooner than that after their client


def watch(client: Endpoint, server: Endpoint, peers: Peers) -> None:
    """Close the connection to the server once the client has closed its connection."""
    later = asyncio.get_running_loop().call_later
    client.after_eof = lambda: later(_PAUSE, _check, client, server, peers)


def _check(client: Endpoint, server: Endpoint, peers: Peers) -> None:
    # Not a closure that refers to itself: such a reference cycle would keep both endpoints alive
    # until the garbage collector runs.
    if server.at_eof:
        return
    if _is_held(client, peers):
        asyncio.get_running_loop().call_later(_PAUSE, _check, client, server, peers)
    else:
        server.abort()


def _is_held(client: Endpoint, peers: Peers) -> bool:
    if client.transport.is_closing():
        return False
    ours = client.transport.get_extra_info("socket")
    if ours.family != socket.AF_UNIX:
        peer = client.transport.get_extra_info("peername")
        known = TELLS_PEERS and peer is not None and ports.is_loopback(peer[0])
        return not known or peers.is_held(ours)
    poll = select.poll()
    poll.register(ours.fileno(), 0)  # POLLHUP, that both directions are shut, is always reported
    return not poll.poll(0)
