"""TLS for the client's side of a connection, sans-IO: it converts ciphertext to plaintext and back.

A client starts TLS with an SSLRequest, or directly with ALPN (PostgreSQL docs, "SSL Session
Encryption"). The module has no sockets of its own, so TLS can start with bytes that have been read
already, and each direction is closed independently, as without TLS.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator

from pgtemp.wire.messages import ProtocolError

ALPN = "postgresql"
# A fatal handshake_failure alert: a server without a certificate sends it in response to direct
# TLS.
NO_TLS = b"\x15\x03\x01\x00\x02\x02\x28"
_READ_SIZE = 1 << 16
_MAX_HANDSHAKE = 1 << 16  # bytes; a ClientHello has at most 16 kB
# Records of a connection without data: handshake, alerts, KeyUpdate, empty ones. A client sends
# fewer than ten to connect, and then a KeyUpdate after gigabytes of data. OpenSSL sets no limit,
# and each KeyUpdate makes it derive keys and send an answer.
_MAX_WITHOUT_DATA = 100
_AT_ONCE = 16  # records that are decrypted before the limits are checked
_RECORD_HEAD = 5  # bytes: type, version, length (RFC 8446, 5.1)


class Tls:
    """The TLS of one connection, from its handshake on.

    Attributes:
        ended: whether the client has sent close_notify, or cannot send any more data.
    """

    def __init__(self, context: ssl.SSLContext, *, direct: bool) -> None:
        """
        Args:
            direct: TLS was started without an SSLRequest, so ALPN must name the protocol.
        """
        self._arrived, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._to_send, server_side=True)
        self._direct = direct
        self._agreed = False
        self._finished = False
        self.ended = False
        self._received = 0  # bytes
        self._without_data = 0  # complete records
        self._head = bytearray()  # of the record that arrives
        self._missing = 0  # bytes of that record

    def receive(self, data: bytes) -> bytes:
        """Decrypt bytes that have arrived; afterwards there may be bytes to `take`.

        Raises:
            ProtocolError: the bytes are not TLS, the handshake fails, or the client sends too much
                that is no data.
        """
        parts: list[bytes] = []
        for records in self._pieces(data):
            if self.ended:  # the buffer would grow, as it is not read any more
                break
            self._decrypt(records, parts)
        return b"".join(parts)

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        """Divide data so that no piece contains the end of more than _AT_ONCE records."""
        begin = at = records = 0
        while at < len(data):
            if len(self._head) < _RECORD_HEAD:
                more = data[at : at + _RECORD_HEAD - len(self._head)]
                self._head += more
                at += len(more)
                if len(self._head) < _RECORD_HEAD:
                    break
                self._missing = int.from_bytes(self._head[3:], "big")
            arrived = min(self._missing, len(data) - at)
            at += arrived
            self._missing -= arrived
            if not self._missing:
                self._head.clear()
                self._without_data += 1
                records += 1
                if records % _AT_ONCE == 0:
                    yield data[begin:at]
                    begin = at
        if begin < len(data):
            yield data[begin:]

    def _decrypt(self, data: bytes, parts: list[bytes]) -> None:
        """Decrypt whole records and the beginning of another, and append their data to `parts`."""
        self._arrived.write(data)
        self._received += len(data)
        try:
            if not self._agreed:
                self._tls.do_handshake()
                self._agreed = True
                if self._direct and self._tls.selected_alpn_protocol() != ALPN:
                    self.ended = True
                    raise ProtocolError(f"direct TLS without the application protocol {ALPN}")
            while part := self._tls.read(_READ_SIZE):
                parts.append(part)
                self._without_data -= 1  # OpenSSL returns the data of one record at a time
            self.ended = True
        except ssl.SSLWantReadError:
            too_long = not self._agreed and self._received > _MAX_HANDSHAKE
            if too_long or self._without_data > _MAX_WITHOUT_DATA:
                self.ended = True
                raise ProtocolError("TLS: too many bytes without data") from None
        except ssl.SSLError as error:
            self.ended = True
            if not self._finished:  # after our close_notify, errors of the client do not matter
                raise ProtocolError(f"TLS: {error.reason or error}") from error

    def encrypt(self, data: bytes) -> bytes:
        """Return the bytes to send for `data`; before the handshake is complete, drop `data`."""
        if data and self._agreed:
            self._tls.write(data)
        return self.take()

    def take(self) -> bytes:
        """Return the bytes to send: parts of the handshake, responses, alerts."""
        return self._to_send.read()

    def finish(self) -> bytes:
        """Return the last bytes to send: close_notify, which announces the end of data."""
        self._finished = True
        try:
            if self._agreed:
                self._tls.unwrap()
        except ssl.SSLError:  # ours is sent; the client has not sent its close_notify yet
            pass
        return self.take()
