"""A TLS client that sends KeyUpdate messages, which no function of Python's ssl module does."""

from __future__ import annotations

import hmac
import ssl
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_HASHES = {
    "TLS_AES_256_GCM_SHA384": ("sha384", 32),
    "TLS_AES_128_GCM_SHA256": ("sha256", 16),
}
_UPDATE = b"\x18\0\0\1\1" + b"\x16"  # KeyUpdate(update_requested) and the type of its record
_APPLICATION_DATA = b"\x17\3\3"


class KeyUpdates:
    """A TLS 1.3 handshake, and the records that continue it (RFC 8446, 5.2, 7.2 and 7.3)."""

    def __init__(self, context: ssl.SSLContext, keys: Path) -> None:
        """
        Args:
            keys: a file for the secrets of the connection.
        """
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.keylog_filename = str(keys)
        self._keys = keys
        self._arrived, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._to_send, server_hostname="localhost")

    def handshake(self, exchange: Callable[[bytes], bytes]) -> bytes:
        """Do the handshake by `exchange`; return the last bytes to send."""
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._arrived.write(exchange(self._to_send.read()))
        (line,) = (
            line for line in self._keys.read_text().splitlines()
            if line.startswith("CLIENT_TRAFFIC_SECRET_0 ")
        )  # fmt: skip
        self._secret, self._number = bytes.fromhex(line.split()[2]), 0
        return self._to_send.read()

    def update(self, count: int) -> bytes:
        """Return this many KeyUpdate messages, each in a record of its own."""
        sent = b""
        for _ in range(count):
            sent += self.record(_UPDATE[:-1], _UPDATE[-1:])
            self._secret, self._number = self._expand(b"traffic upd", len(self._secret)), 0
        return sent

    def record(self, data: bytes, kind: bytes = b"\x17") -> bytes:
        """Return a record with these bytes; application data by default."""
        cipher = self._tls.cipher()
        assert cipher is not None
        key = self._expand(b"key", _HASHES[cipher[0]][1])
        iv = int.from_bytes(self._expand(b"iv", 12), "big") ^ self._number
        self._number += 1
        head = _APPLICATION_DATA + (len(data) + 1 + 16).to_bytes(2, "big")
        return head + AESGCM(key).encrypt(iv.to_bytes(12, "big"), data + kind, head)

    def _expand(self, label: bytes, length: int) -> bytes:
        """HKDF-Expand-Label with an empty context; one block suffices for these lengths."""
        cipher = self._tls.cipher()
        assert cipher is not None
        label = b"tls13 " + label
        info = length.to_bytes(2, "big") + bytes([len(label)]) + label + b"\0"
        return hmac.digest(self._secret, info + b"\1", _HASHES[cipher[0]][0])[:length]
