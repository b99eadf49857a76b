"""TLS on the client's side of a connection, sans-IO: ciphertext in, plaintext out, and back.

Both forms begin it: SSLRequest, and directly with ALPN (PostgreSQL docs, 54.2.11 "SSL Session
Encryption"). Without sockets of its own it can begin with bytes that have been read already, and
each direction ends by itself, as it does without TLS.
"""

from __future__ import annotations

import ssl

from pgtemp.wire.messages import ProtocolError

ALPN = "postgresql"
# handshake_failure, fatal: what a server without a certificate says to who begins with TLS.
NO_TLS = b"\x15\x03\x01\x00\x02\x02\x28"
_MOST = 1 << 16


class Tls:
    """One connection, from its handshake on.

    Attributes:
        ended: whether the client has said that nothing more comes, or can say nothing more.
    """

    def __init__(self, context: ssl.SSLContext, *, direct: bool) -> None:
        """
        Args:
            direct: begun without SSLRequest, where the protocol has to be named by ALPN.
        """
        self._arrived, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._to_send, server_side=True)
        self._direct = direct
        self._agreed = False
        self._finished = False
        self.ended = False

    def receive(self, data: bytes) -> bytes:
        """The plaintext in what has arrived; afterwards there may be something to `take`.

        Raises:
            ProtocolError: it is no TLS, or not what is spoken here.
        """
        if self.ended:  # nobody would ever take it out again
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
            while part := self._tls.read(_MOST):
                parts.append(part)
            self.ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.ended = True
            if not self._finished:  # who has been said goodbye to may say what it likes
                raise ProtocolError(f"TLS: {error.reason or error}") from error
        return b"".join(parts)

    def encrypt(self, data: bytes) -> bytes:
        """What is to be sent for `data`: nothing where the client cannot read it yet."""
        if data and self._agreed:
            self._tls.write(data)
        return self.take()

    def take(self) -> bytes:
        """What is to be sent: parts of the handshake, answers, alerts."""
        return self._to_send.read()

    def finish(self) -> bytes:
        """What is to be sent last: that nothing more comes (close_notify)."""
        self._finished = True
        try:
            if self._agreed:
                self._tls.unwrap()
        except ssl.SSLError:  # it has been said; the client has not said so yet
            pass
        return self.take()
