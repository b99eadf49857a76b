"""Passwords and their SCRAM verifiers, which PostgreSQL stores.

A verifier contains its own number of hash iterations (RFC 5802; PostgreSQL docs, "pg_authid").
Iterations protect passwords that can be guessed. A random password of 144 bits cannot be guessed,
so its verifier has one iteration, which saves libpq five milliseconds per connection. A password
that a user chose gets libpq's own 4,096 iterations.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from dataclasses import dataclass, field

_BYTES = 18
_ITERATIONS = 1
STRONG_ITERATIONS = 4096  # the number that libpq itself uses


@dataclass(frozen=True, slots=True)
class Secret:
    """A password and its verifier; if `verifier` is None, libpq computes it."""

    password: str = field(repr=False)
    verifier: str | None = field(default=None, repr=False)


def random_secret(iterations: int = _ITERATIONS) -> Secret:
    """Return a random password of hexadecimal digits, which never need quoting."""
    password = secrets.token_hex(_BYTES)
    return Secret(password, _scram_verifier(password, secrets.token_bytes(16), iterations))


def _scram_verifier(password: str, salt: bytes, iterations: int) -> str:
    """Return the SCRAM-SHA-256 verifier as PostgreSQL stores it.

    The password must be ASCII, which SASLprep does not change.
    """
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    stored_key = hashlib.sha256(client_key).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    salt64, stored64, server64 = (
        base64.b64encode(part).decode() for part in (salt, stored_key, server_key)
    )
    # Four digits, as in initdb's 4096, so that all verifiers have the same length.
    return f"SCRAM-SHA-256${iterations:04d}:{salt64}${stored64}:{server64}"
