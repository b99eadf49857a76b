"""TLS for the client's side of a connection, sans-IO: it converts ciphertext to plaintext and back.

A client starts TLS with an SSLRequest, or directly with ALPN (PostgreSQL docs, "SSL Session
Encryption"). The module has no sockets of its own, so TLS can start with bytes that have been read
already, and each direction is closed independently, as without TLS.
"""

from __future__ import annotations

import ssl

from pgtemp.wire.messages import ProtocolError

ALPN = "postgresql"
# A fatal handshake_failure alert: a server without a certificate sends it in response to direct
# TLS.
NO_TLS = b"\x15\x03\x01\x00\x02\x02\x28"
_READ_SIZE = 1 << 16


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

    def receive(self, data: bytes) -> bytes:
        """Decrypt bytes that have arrived; afterwards there may be bytes to `take`.

        Raises:
            ProtocolError: the bytes are not TLS, or the handshake fails.
        """
        if self.ended:  # nothing reads the buffer any more, so it would only grow
            return b""
        self._arrived.write(data)
        parts = []
        try:
            if not self._agreed:
                self._tls.do_handshake()
                self._agreed = True
                if self._direct and self._tls.selected_alpn_protocol() != ALPN:
                    self.ended = True
                    raise ProtocolError(f"direct TLS without the application protocol {ALPN}")
            while part := self._tls.read(_READ_SIZE):
                parts.append(part)
            self.ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.ended = True
            if not self._finished:  # after our close_notify, errors of the client do not matter
                raise ProtocolError(f"TLS: {error.reason or error}") from error
        return b"".join(parts)

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
