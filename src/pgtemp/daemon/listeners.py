"""Listeners: the daemon's addresses, the clients that each admits, and TLS.

The unix socket admits every client that can enter its directory, which has mode 0700. TCP admits
the user who runs the daemon, and root; the daemon gets the client's user from the kernel. With a
password file, TCP admits every client that has the password, which PostgreSQL itself checks.
Without a password the daemon does not listen on addresses that other machines can reach.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from dataclasses import dataclass

from pgtemp.daemon.error_responses import RefusedError
from pgtemp.daemon.relay import Endpoint
from pgtemp.errors import OptionError
from pgtemp.host import ports
from pgtemp.host.peer_credentials import OVERFLOW_UID, TELLS_PEERS, Peers
from pgtemp.options.daemon import DaemonOptions

BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Listener:
    """How clients at an address are admitted; by default all of them, as at the unix socket.

    Attributes:
        peers: identifies the clients' users; None if clients of all users are admitted.
        by_password: whether PostgreSQL must request a password.
        tls: the context for TLS; None if the daemon has no certificate.
    """

    peers: Peers | None = None
    by_password: bool = False
    tls: ssl.SSLContext | None = None

    def refusal(self, client: Endpoint) -> RefusedError | None:
        """Return an error unless the client's user is the user who runs the daemon, or root.

        Any other local user that is admitted over loopback could run shell commands as the
        server's user, with COPY FROM PROGRAM.
        """
        if self.peers is None:
            return None
        uid = None  # if a transport is closing, another socket may have its descriptor by now
        if not client.transport.is_closing():
            uid = self.peers.uid(client.transport.get_extra_info("socket"))
        if uid in (0, os.geteuid()):
            return None
        other = "a user that the kernel does not identify" if uid is None else f"uid {uid}"
        return RefusedError(
            "28000",
            f"pgtemp serves the user who runs it (uid {os.geteuid()}), not {other}",
            "start a pgtemp of your own, on another port, or this one with --password-file",
        )


def of_tcp(options: DaemonOptions, peers: Peers, tls: ssl.SSLContext | None) -> Listener:
    """Return the listener for the TCP addresses."""
    by_password = options.password_file is not None
    return Listener(peers if TELLS_PEERS and not by_password else None, by_password, tls)


def listen(options: DaemonOptions) -> list[socket.socket]:
    """Return listening sockets for all requested addresses. Raises OptionError."""
    if options.password_file is None and TELLS_PEERS and os.geteuid() == OVERFLOW_UID:
        raise OptionError(
            f"pgtemp runs as uid {OVERFLOW_UID}, which the kernel also reports for users that are "
            "not mapped, so pgtemp cannot identify its clients over TCP",
            remedy="run pgtemp as another user, or with --password-file or --no-tcp",
        )
    bound: list[socket.socket] = []
    try:
        for address in _addresses(options):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            try:
                bound.append(
                    socket.create_server(
                        (address, options.listen_port), family=family, backlog=BACKLOG
                    )
                )
                # Accepted connections inherit this; asyncio's own event loop would not set it.
                bound[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                if bound and family == socket.AF_INET6 and error.errno != errno.EADDRINUSE:
                    continue  # a machine without IPv6
                raise ports.taken(
                    address, options.listen_port, os.strerror(error.errno or 0)
                ) from error
    except BaseException:
        for listening in bound:
            listening.close()
        raise
    return bound


def _addresses(options: DaemonOptions) -> list[str]:
    if options.listen is None:
        addresses = ports.loopback_addresses(options.host)
        if not addresses:
            raise OptionError(
                f"{options.host} is not this machine",
                remedy="use localhost, and --listen to serve others",
            )
        return addresses
    addresses = ports.addresses(options.listen)
    if not addresses:
        raise OptionError(
            f"{options.listen} is not an address that pgtemp can listen on",
            remedy="give a name or an address of this machine, or 0.0.0.0 for all",
        )
    if options.password_file is None and not all(map(ports.is_loopback, addresses)):
        raise OptionError(
            f"without a password pgtemp does not listen on {options.listen}, which other machines "
            "can reach",
            remedy="give --password-file, or listen on localhost",
        )
    return addresses
