"""The daemon's TLS certificate, and the password that it reads from a file."""

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
from pgtemp.host import user_paths
from pgtemp.options.daemon import DaemonOptions
from pgtemp.options.server import StrPath
from pgtemp.sql.passwords import Secret
from pgtemp.wire.tls import ALPN

_log = logging.getLogger("pgtemp.daemon")
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_MAX_PASSWORD = 1000  # bytes; libpq accepts no longer password from a client


@dataclass(frozen=True, slots=True)
class Certificate:
    """The certificate for TLS.

    Attributes:
        root: the root certificate (PEM) that clients verify it with, if it was made for this run.
    """

    context: ssl.SSLContext
    root: bytes = b""


def password(options: DaemonOptions) -> Secret | None:
    """Read the password for clients over TCP; None if none is required. Raises OptionError."""
    path = options.password_file
    if path is None:
        return None
    shown = os.fspath(path)
    try:
        with open(user_paths.open_file(path), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            first = file.readline(_MAX_PASSWORD + 1).rstrip(b"\r\n")
        text = first.decode()
    except OSError as error:
        raise OptionError(
            f"{shown} cannot be read: {error.strerror}",
            remedy="give a file that contains the password",
        ) from error
    except UnicodeDecodeError as error:
        raise OptionError(
            f"the password in {shown} is not UTF-8", remedy="write it as UTF-8"
        ) from error
    if not text or "\0" in text or len(first) > _MAX_PASSWORD:
        raise OptionError(
            f"the first line of {shown} is no password",
            remedy="write the password and a newline into it",
        )
    if options.password not in (None, text):
        raise OptionError(
            f"the URI has a different password than {shown}",
            remedy="leave the password out of the URI",
        )
    if stat.S_ISREG(mode) and mode & 0o077:
        _log.warning("other users can read or write %s; run chmod 600 on it", shown)
    return Secret(text)


def certificate(options: DaemonOptions) -> Certificate | None:
    """Load or make the certificate for TLS; None if TLS is off. Raises OptionError."""
    if options.tls is None and options.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols([ALPN])
    context.options |= ssl.OP_NO_RENEGOTIATION
    if options.tls_cert is None:
        return Certificate(
            context, _make_certificate(context, [*_LOCAL_NAMES, socket.gethostname()])
        )
    _load(context, options.tls_cert, options.tls_key)
    return Certificate(context)


def _load(context: ssl.SSLContext, certificate: StrPath, key: StrPath | None) -> None:
    shown = f"{os.fspath(certificate)}{f' and {os.fspath(key)}' if key is not None else ''}"

    def refuse_passphrase() -> str:
        # OpenSSL would read it from the terminal, and a daemon may have none.
        raise OptionError(
            f"the key in {shown} is protected by a passphrase",
            remedy="give a key without a passphrase",
        )

    try:
        context.load_cert_chain(certificate, key, password=refuse_passphrase)
    except ssl.SSLError as error:
        raise OptionError(
            f"{shown} cannot be used for TLS: {error.reason or error}",
            remedy="give a certificate in PEM with --tls-cert, and its key with --tls-key",
        ) from error


def _make_certificate(context: ssl.SSLContext, names: list[str]) -> bytes:
    """Make a certificate for this run; return its root certificate (PEM)."""
    try:
        import trustme
    except ImportError as error:
        raise OptionError(
            "making a certificate requires the package trustme",
            remedy="pip install 'pgtemp[tls]', or give --tls-cert",
        ) from error
    authority = trustme.CA(organization_name="pgtemp")
    valid = []
    for name in names:
        with suppress(ValueError):  # a host name may be invalid in a certificate
            authority.issue_cert(name)
            valid.append(name)
    authority.issue_cert(*valid).configure_cert(context)
    return authority.cert_pem.bytes()


def write_root(made: Certificate | None, directory: str) -> Path | None:
    """Write the root certificate to a file, for clients that verify the daemon's certificate."""
    if made is None or not made.root:
        return None
    path = Path(directory) / "root.crt"
    path.write_bytes(made.root)
    return path
