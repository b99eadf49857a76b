"""TCP ports on this machine: local addresses, free ports, and the processes that use ports."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from contextlib import suppress

from pgtemp.errors import OptionError
from pgtemp.host import procfs

LOOPBACK = "127.0.0.1"
_LISTEN = "0A"


def addresses(host: str) -> list[str]:
    """The addresses that `host` resolves to, IPv4 first; none if it does not resolve.

    `*` stands for every address of this machine.
    """
    if host == "*":
        return ["0.0.0.0", "::"]  # noqa: S104
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return []
    return sorted(found, key=lambda address: ":" in address)


def is_loopback(address: str) -> bool:
    """Whether an address can be reached from this machine only."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def is_any(host: str) -> bool:
    """Whether `host` stands for every address of this machine."""
    return host in ("*", "0.0.0.0", "::")  # noqa: S104


def loopback_addresses(host: str) -> list[str]:
    """The loopback addresses of `host`; empty if any of its addresses is not a loopback address.

    An address that this machine lacks is left out: /etc/hosts may name ::1 without IPv6.
    """
    found = addresses(host)
    return [one for one in found if _exists(one)] if all(map(is_loopback, found)) else []


def bind_error(address: str, port: int) -> str | None:
    """Why a server could not listen on (address, port) right now; None if it could."""
    try:
        with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        return error.strerror or str(error)
    return None


def _exists(address: str) -> bool:
    try:
        with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError as error:
        return error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True


def free_port(address: str, *others: str) -> int:
    """A port that is free now on all addresses; another process may take it at any time."""
    while True:
        with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
            port: int = probe.getsockname()[1]
            if not any(bind_error(other, port) for other in others):
                return port


def listens(address: str, port: int, pid: int) -> bool:
    """Whether a process itself listens on (address, port); True if that is unknown."""
    rows = tcp_rows("6" if ":" in address else "4")
    local = hex_endpoint(address, port)
    listening = {f"socket:[{row[9]}]" for row in rows if row[1] == local and row[3] == _LISTEN}
    try:
        return not rows or bool(listening & _files_of(pid))
    except OSError:  # there is no /proc, or it hides the process
        return bool(listening)


def _files_of(pid: int | str) -> set[str]:
    """The open files of a process. Raises OSError if they are unknown."""
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):  # it was closed meanwhile
            found.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def hex_endpoint(address: str, port: int) -> str:
    """An endpoint as in /proc/net/tcp: 32-bit words in the machine's byte order, in hexadecimal."""
    packed = socket.inet_pton(_family(address), address.partition("%")[0])
    words = (packed[i : i + 4] for i in range(0, len(packed), 4))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words) + f":{port:04X}"


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def holder(port: int) -> str:
    """The process that listens on a TCP port, as "pid 123 (postgres)"; "" if that is unknown."""
    sockets = {
        f"socket:[{row[9]}]" for row in tcp_rows() if _port(row[1]) == port and row[3] == _LISTEN
    }
    if not sockets:
        return ""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if sockets & _files_of(pid):
                return f"pid {pid} ({''.join(procfs.lines(f'{pid}/comm')).strip()})"
    return ""


def tcp_rows(family: str = "46") -> list[list[str]]:
    """The rows of /proc/net/tcp and tcp6; fields: 1 local, 2 remote, 3 state, 7 uid, 9 inode."""
    rows: list[list[str]] = []
    for digit, name in (("4", "net/tcp"), ("6", "net/tcp6")):
        if digit in family:
            rows += [line.split() for line in procfs.lines(name)[1:]]
    return rows


def _port(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2], 16)


def taken(address: str, port: int, reason: str) -> OptionError:
    """The error for a port on which a server cannot listen."""
    by = holder(port)
    return OptionError(
        f"port {port} on {address} cannot be used: {reason}{f', by {by}' if by else ''}",
        remedy="choose another port, or stop that process" if by else "choose another port",
    )
