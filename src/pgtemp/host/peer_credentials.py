"""The user at the other end of a loopback TCP connection.

A sock_diag(7) request queries the kernel for the one connection and takes 0.02 ms. If the kernel
does not answer, the table of all connections is read, which takes 2 ms.

The addresses and ports of both ends must match, since a port may be in use on several loopback
addresses at the same time; and the socket must have an inode, since the kernel reports that a
socket which no process holds any more belongs to root. A client may connect to an IPv4 address
through an IPv6 socket, as Java does; the kernel then reports both ends in their IPv6 form.

The kernel looks a connection up by its addresses, and once a client has closed its socket, another
process can use its port immediately. Two checks ensure that the answer is about this connection:

- The other end has completed its handshake. A client in SYN_SENT may have the endpoints of our
  connection: after a close its port is free before our end notices (FIN_WAIT2 may end after a
  second, tcp(7), TCP_LINGER2; or the reset is still on its way).
- Our end is not closed after the answer. Until then the kernel gives each segment with these
  endpoints to our socket (tcp_v4_rcv looks for a connection before it looks for a listener), so no
  other client can complete a handshake from there. Once a reset or both FINs have closed our
  socket, getpeername(2) fails with ENOTCONN. It must be called on the descriptor: the transports of
  asyncio and uvloop return the name that they read first, even after a reset.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from contextlib import suppress
from typing import Protocol

from pgtemp.host import procfs
from pgtemp.host.ports import hex_endpoint, tcp_rows

Endpoint = tuple[str, int]
# Other systems have no such request.
TELLS_PEERS = sys.platform == "linux"
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, _NLMSG_ERROR = 4, 20, 1, 2
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, pid
_REQUEST = struct.Struct("=BBBBI")  # inet_diag_req_v2 before its id: family, protocol, -, -, states
_ANY = 0xFFFFFFFF
_UID_AND_INODE = struct.Struct("=II")
# In inet_diag_msg; the id's interface and cookie follow.
_STATE_AT, _ID_AT, _ID_LENGTH, _UID_AT = 1, 4, 36, 64
# States after the handshake (net/tcp_states.h): ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT,
# LAST_ACK, CLOSING.
_CONNECTED = (1, 4, 5, 8, 9, 11)
_SO_PASSRIGHTS = 83
_CREDENTIALS = struct.Struct("3i")  # of SO_PEERCRED: pid, uid, gid
_MAPPED = bytes(10) + b"\xff\xff"  # before an IPv4 address, in its IPv6 form


class Connection(Protocol):
    """A connected TCP socket, or the object that an asyncio transport provides for one."""

    @property
    def family(self) -> int: ...

    def fileno(self) -> int: ...


# The kernel reports every user that our user namespace does not map as this one
# (user_namespaces(7)), so it identifies no user, not even the one that has this number. The default
# is DEFAULT_OVERFLOWUID, linux/highuid.h.
OVERFLOW_UID = int(procfs.read("sys/kernel/overflowuid") or 65534)


def refuse_descriptors(connected: socket.socket) -> None:
    """Prevent the other end of a unix socket from sending descriptors (since Linux 6.16).

    The kernel closes unexpected descriptors in the reader's thread, which may take as long as the
    sender likes (SO_LINGER).
    """
    with suppress(OSError):
        connected.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def check_listener(connected: socket.socket, uid: int) -> None:
    """Check, before anything is sent, that a process of user `uid` listens on a unix socket.

    A server user can replace the socket by a link, which could make root connect to any other
    socket. Raises ConnectionRefusedError if another user's process listens there.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return
    got = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    found = _CREDENTIALS.unpack(got)[1]
    if found != uid:
        raise ConnectionRefusedError(
            errno.ECONNREFUSED, f"the listening process belongs to uid {found}, not to uid {uid}"
        )


class Peers:
    """Queries the kernel for the users at the other ends of connections. Not thread-safe."""

    def __init__(self) -> None:
        self._kernel: socket.socket | None = None

    def uid(self, connection: Connection) -> int | None:
        """The user at the other end; None if it cannot be determined."""
        uid = self._verified(connection)
        return None if uid == OVERFLOW_UID else uid

    def is_held(self, connection: Connection) -> bool:
        """Whether a process of any user holds the other end."""
        return self._verified(connection) is not None

    def _verified(self, connection: Connection) -> int | None:
        ours = socket.socket(connection.family, socket.SOCK_STREAM, fileno=connection.fileno())
        try:
            uid = self.holder(ours.getpeername()[:2], ours.getsockname()[:2])
            ours.getpeername()
        except OSError:  # our end is closed
            return None
        finally:
            ours.detach()
        return uid

    def holder(self, peer: Endpoint, ours: Endpoint) -> int | None:
        """The user that holds one end of a connection for which this process has no descriptor.

        None means that no process holds it. The answer may be about a later connection between the
        same addresses.

        Args:
            peer: address and port of that end.
            ours: address and port of the other end.
        """
        try:
            if self._kernel is None:
                self._kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
            return _query_kernel(self._kernel, peer, ours)
        except OSError:  # no sock_diag in this kernel or container, or no answer yet
            self.close()
            return _search_table(peer, ours)

    def close(self) -> None:
        if self._kernel is not None:
            self._kernel.close()
            self._kernel = None


def _query_kernel(kernel: socket.socket, peer: Endpoint, ours: Endpoint) -> int | None:
    """Query by sock_diag. Raises OSError if the kernel does not support it."""
    family = socket.AF_INET6 if ":" in peer[0] else socket.AF_INET
    connection = struct.pack("!HH", peer[1], ours[1]) + _padded(peer[0]) + _padded(ours[0])
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _ANY) + connection
    request += struct.pack("=III", 0, _ANY, _ANY)  # any interface, no cookie
    length = _HEADER.size + len(request)
    # The kernel has queued its answer by the time send() returns.
    kernel.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + request)
    answer = kernel.recv(4096, socket.MSG_DONTWAIT)
    if _HEADER.unpack_from(answer)[1] == _NLMSG_ERROR:
        code = -struct.unpack_from("=i", answer, _HEADER.size)[0]
        if code == 2:  # ENOENT: there is no such connection
            return None
        raise OSError(code, "sock_diag")
    message = answer[_HEADER.size :]
    uid, inode = _UID_AND_INODE.unpack_from(message, _UID_AT)
    # If there is no such connection, the kernel may answer with a listening socket.
    found = _plain(message[_ID_AT : _ID_AT + _ID_LENGTH]) == connection
    return uid if found and inode and message[_STATE_AT] in _CONNECTED else None


def _plain(connection: bytes) -> bytes:
    """Ports and addresses of both ends, with mapped IPv4 addresses converted to IPv4."""
    ends = [connection[at : at + 16].removeprefix(_MAPPED).ljust(16, b"\0") for at in (4, 20)]
    return connection[:4] + b"".join(ends)


def _padded(address: str) -> bytes:
    return _packed(address).ljust(16, b"\0")


def _packed(address: str) -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.inet_pton(family, address.partition("%")[0])


def _search_table(peer: Endpoint, ours: Endpoint) -> int | None:
    """Look a connection up in the table of all connections."""
    forms = ("",) if ":" in peer[0] else ("", "::ffff:")
    pairs = [[hex_endpoint(form + end[0], end[1]) for end in (peer, ours)] for form in forms]
    rows = tcp_rows("6" if ":" in peer[0] else "46")
    theirs = [row for row in rows if row[1:3] in pairs and row[9] != "0"]
    if len(theirs) != 1 or int(theirs[0][3], 16) not in _CONNECTED:
        return None
    return int(theirs[0][7])
