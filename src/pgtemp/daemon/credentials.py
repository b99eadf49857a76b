"""What the daemon shows and asks for: its certificate, and the password from a file."""

from __future__ import annotations

import logging
import os
import socket
import ssl
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pgtemp.errors import OptionError
from pgtemp.host import reach
from pgtemp.options.daemon import DaemonOptions
from pgtemp.options.server import StrPath
from pgtemp.sql.passwords import Secret
from pgtemp.wire.tls import ALPN

_log = logging.getLogger("pgtemp.daemon")
_HERE = ("localhost", "127.0.0.1", "::1")
_MOST = 1000  # bytes; libpq takes no more from a client


@dataclass(frozen=True, slots=True)
class Certificate:
    """What TLS is spoken with. `root` vouches for it, where it was made for this run (PEM)."""

    context: ssl.SSLContext
    root: bytes = b""


def password(options: DaemonOptions) -> Secret | None:
    """What clients need who come by TCP; None where nothing is asked. Raises OptionError."""
    path = options.password_file
    if path is None:
        return None
    shown = os.fspath(path)
    try:
        with open(reach.open_file(path), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            first = file.readline(_MOST + 1).rstrip(b"\r\n")
        text = first.decode()
    except OSError as error:
        raise OptionError(
            f"{shown} cannot be read: {error.strerror}", remedy="name a file with a password"
        ) from error
    except UnicodeDecodeError as error:
        raise OptionError(
            f"the password in {shown} is not UTF-8", remedy="write it as UTF-8"
        ) from error
    if not text or "\0" in text or len(first) > _MOST:
        raise OptionError(
            f"the first line of {shown} is no password", remedy="write one into it, and a newline"
        )
    if options.password not in (None, text):
        raise OptionError(
            f"the URI has another password than {shown}", remedy="leave it out of the URI"
        )
    if stat.S_ISREG(mode) and mode & 0o077:
        _log.warning("%s is open to other users; chmod 600 closes it", shown)
    return Secret(text)


def certificate(options: DaemonOptions) -> Certificate | None:
    """What TLS is spoken with; None where it is not. Raises OptionError."""
    if options.tls is None and options.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols([ALPN])
    context.options |= ssl.OP_NO_RENEGOTIATION
    if options.tls_cert is None:
        return Certificate(context, _made_for(context, [*_HERE, socket.gethostname()]))
    _load(context, options.tls_cert, options.tls_key)
    return Certificate(context)


def _load(context: ssl.SSLContext, certificate: StrPath, key: StrPath | None) -> None:
    shown = f"{os.fspath(certificate)}{f' and {os.fspath(key)}' if key is not None else ''}"

    def ask() -> str:
        # Rather than on the terminal, where a daemon may have none.
        raise OptionError(
            f"the key in {shown} is locked by a passphrase", remedy="give one that is not"
        )

    try:
        context.load_cert_chain(certificate, key, password=ask)
    except ssl.SSLError as error:
        raise OptionError(
            f"{shown} cannot be used for TLS: {error.reason or error}",
            remedy="give a certificate in PEM with --tls-cert, and its key with --tls-key",
        ) from error


def _made_for(context: ssl.SSLContext, names: list[str]) -> bytes:
    """Make a certificate for this run; who vouches for it."""
    try:
        import trustme
    except ImportError as error:
        raise OptionError(
            "a certificate cannot be made without trustme",
            remedy="pip install 'pgtemp[tls]', or give --tls-cert",
        ) from error
    authority = trustme.CA(organization_name="pgtemp")
    known = []
    for name in names:
        with suppress(ValueError):  # a machine's name need not be one that certificates can have
            authority.issue_cert(name)
            known.append(name)
    authority.issue_cert(*known).configure_cert(context)
    return authority.cert_pem.bytes()


def write_root(made: Certificate | None, directory: str) -> Path | None:
    """Put down who vouches for the certificate, for clients that check it."""
    if made is None or not made.root:
        return None
    path = Path(directory) / "root.crt"
    path.write_bytes(made.root)
    return path
