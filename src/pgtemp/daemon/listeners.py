"""The ways in: what is listened on, who is admitted there, and whether TLS is spoken.

The unix socket is for who may enter its directory, of mode 0700. On TCP it is the user who runs the
daemon, and root, told by the kernel; or, with a password file, whoever has the password, which
PostgreSQL itself asks for. Beyond this machine nobody listens without a password.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Callable
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
    """A way in.

    Attributes:
        refusal: what is said to who may not come in; None to who may.
        by_password: whether PostgreSQL is to ask for a password.
        tls: what TLS is spoken with; None where it is not.
    """

    refusal: Callable[[Endpoint], RefusedError | None]
    by_password: bool = False
    tls: ssl.SSLContext | None = None


def of_tcp(options: DaemonOptions, peers: Peers, tls: ssl.SSLContext | None) -> Listener:
    """The door at the TCP addresses."""
    if options.password_file is not None:
        return Listener(_anybody, by_password=True, tls=tls)
    return Listener(lambda client: _other_user(client, peers), tls=tls)


def of_socket() -> Listener:
    """The door of the unix socket: its directory's mode says who, and nobody listens in."""
    return Listener(_anybody)


def _anybody(client: Endpoint) -> None:
    return None


def _other_user(client: Endpoint, peers: Peers) -> RefusedError | None:
    """Only the user who runs the daemon is admitted, and root.

    Over trusted loopback any local user could run shell commands as the server's user, with
    COPY FROM PROGRAM.
    """
    if not TELLS_PEERS:
        return None
    uid = None  # the descriptor of a transport that is closing may be another socket's by now
    if not client.transport.is_closing():
        uid = peers.uid(client.transport.get_extra_info("socket"))
    if uid in (0, os.geteuid()):
        return None
    other = "a user that the kernel does not identify" if uid is None else f"uid {uid}"
    return RefusedError(
        "28000",
        f"pgtemp serves the user who runs it (uid {os.geteuid()}), not {other}",
        "start a pgtemp of your own, on another port, or this one with --password-file",
    )


def listen(options: DaemonOptions) -> list[socket.socket]:
    """Sockets that listen on all addresses asked for. Raises OptionError."""
    if options.password_file is None and TELLS_PEERS and os.geteuid() == OVERFLOW_UID:
        raise OptionError(
            f"pgtemp runs as uid {OVERFLOW_UID}, and the kernel reports users that it does not "
            "know by that number, too, so pgtemp cannot identify its clients over TCP",
            remedy="run it as another user, or with --password-file or --no-tcp",
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
                # Accepted connections inherit it; asyncio's own loop would not set it.
                bound[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                if bound and family == socket.AF_INET6 and error.errno != errno.EADDRINUSE:
                    continue  # a machine without IPv6
                raise ports.taken(
                    address, options.listen_port, os.strerror(error.errno or 0)
                ) from error
    except BaseException:
        for one in bound:
            one.close()
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
            f"{options.listen} is no address to listen on",
            remedy="give a name or an address of this machine, or 0.0.0.0 for all",
        )
    if options.password_file is None and not all(map(ports.is_loopback, addresses)):
        raise OptionError(
            f"without a password pgtemp does not listen beyond this machine, on {options.listen}",
            remedy="give --password-file, or listen on localhost",
        )
    return addresses
