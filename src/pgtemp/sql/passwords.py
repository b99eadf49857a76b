"""Passwords, and what PostgreSQL stores of them.

A verifier carries its own count of hash rounds (RFC 5802; PostgreSQL docs, 53.10). Rounds protect
passwords that can be guessed; a random one of 144 bits cannot, so ours has one round, which spares
each connection five milliseconds in libpq. A password that a user chose gets libpq's own 4,096.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from dataclasses import dataclass, field

_BYTES = 18
_ROUNDS = 1
STRONG_ROUNDS = 4096  # what libpq itself takes


@dataclass(frozen=True, slots=True)
class Secret:
    """A password. `verifier` is what to store for it; None lets libpq work that out."""

    password: str = field(repr=False)
    verifier: str | None = field(default=None, repr=False)


def random_secret(rounds: int = _ROUNDS) -> Secret:
    """A password that needs no quoting anywhere."""
    password = secrets.token_hex(_BYTES)
    return Secret(password, _scram_verifier(password, secrets.token_bytes(16), rounds))


def _scram_verifier(password: str, salt: bytes, rounds: int) -> str:
    """SCRAM-SHA-256 as PostgreSQL stores it. For ASCII only, which SASLprep leaves as it is."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, rounds)
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    stored_key = hashlib.sha256(client_key).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    salt64, stored64, server64 = (
        base64.b64encode(part).decode() for part in (salt, stored_key, server_key)
    )
    # Four digits, as initdb's own 4096, so that every verifier has the same length.
    return f"SCRAM-SHA-256${rounds:04d}:{salt64}${stored64}:{server64}"
