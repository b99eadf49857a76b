"""TLS conversations between two ends in memory."""

from __future__ import annotations

import ssl
import tracemalloc

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from pgtemp.wire.messages import SSL_CODE, ProtocolError, startup_message, untyped
from pgtemp.wire.startup import Negotiation, NoTlsError, Secure, Startup
from pgtemp.wire.tls import ALPN, Tls

HELLO = startup_message({"user": "me"})


class ClientEnd:
    """The client's end of a connection."""

    def __init__(self, authority: trustme.CA, alpn: str | None = ALPN) -> None:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        if alpn is not None:
            context.set_alpn_protocols([alpn])
        self._arrived, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._arrived, self._to_send, server_hostname="localhost")

    def handshake(self, server_end: Tls, *, at_once: int) -> bytes:
        """Do the handshake in pieces; return the plaintext that was received meanwhile."""
        plain = b""
        for _ in range(5):
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                pass
            plain += feed(server_end, self._to_send.read(), at_once)
            self._arrived.write(server_end.take())
        self.tls.do_handshake()
        return plain

    def encrypt_data(self, data: bytes) -> bytes:
        self.tls.write(data)
        return self._to_send.read()

    def decrypt(self, data: bytes) -> bytes:
        self._arrived.write(data)
        heard = b""
        try:
            while part := self.tls.read(1 << 16):
                heard += part
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        return heard

    def close_notify(self) -> bytes:
        try:
            self.tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        return self._to_send.read()


def feed(server_end: Tls, data: bytes, at_once: int) -> bytes:
    return b"".join(server_end.receive(data[i : i + at_once]) for i in range(0, len(data), at_once))


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def context(authority: trustme.CA) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.set_alpn_protocols([ALPN])
    authority.issue_cert("localhost").configure_cert(made)
    return made


@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
@pytest.mark.parametrize("direct", [True, False])
def test_pieces_do_not_matter(
    authority: trustme.CA, context: ssl.SSLContext, at_once: int, direct: bool
) -> None:
    """The handshake, data and close_notify in both directions, byte by byte or in one piece."""
    server_end, client_end = Tls(context, direct=direct), ClientEnd(authority)
    assert client_end.handshake(server_end, at_once=at_once) == b""
    data = bytes(range(256)) * 500
    assert feed(server_end, client_end.encrypt_data(data), at_once) == data
    assert client_end.decrypt(server_end.encrypt(data)) == data
    assert server_end.encrypt(b"") == b"" and not server_end.ended
    assert feed(server_end, client_end.close_notify(), at_once) == b"" and server_end.ended
    assert client_end.decrypt(server_end.encrypt(b"afterwards")) == b"afterwards"
    assert server_end.finish() != b""


def test_data_after_our_close_notify_is_no_error(
    authority: trustme.CA, context: ssl.SSLContext
) -> None:
    """The peer may send data until it has received the close_notify."""
    server_end, client_end = Tls(context, direct=False), ClientEnd(authority)
    client_end.handshake(server_end, at_once=1000)
    goodbye = server_end.finish()
    server_end.receive(client_end.encrypt_data(b"still here"))
    assert client_end.decrypt(goodbye) == b""


def test_data_after_the_peers_close_notify_is_discarded(
    authority: trustme.CA, context: ssl.SSLContext
) -> None:
    """So is data after garbage: a client must not use up the daemon's memory."""
    for last in ("goodbye", "garbage"):
        server_end, client_end = Tls(context, direct=False), ClientEnd(authority)
        client_end.handshake(server_end, at_once=1000)
        if last == "goodbye":
            server_end.receive(client_end.close_notify())
        else:
            with pytest.raises(ProtocolError):
                server_end.receive(b"\x17\x03\x03\x00\x30" + bytes(48))
        tracemalloc.start()
        try:
            for _ in range(64):
                assert server_end.receive(bytes(1 << 16)) == b"" and server_end.ended
            assert tracemalloc.get_traced_memory()[0] < 1 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(("direct", "alpn", "fits"), [
    (True, ALPN, True), (True, None, False), (False, None, True), (False, ALPN, True),
])  # fmt: skip
def test_direct_tls_requires_the_application_protocol(
    authority: trustme.CA, context: ssl.SSLContext, direct: bool, alpn: str | None, fits: bool
) -> None:
    server_end, client_end = Tls(context, direct=direct), ClientEnd(authority, alpn)
    if fits:
        client_end.handshake(server_end, at_once=1000)
    else:
        with pytest.raises(ProtocolError, match="application protocol"):
            client_end.handshake(server_end, at_once=1000)


@given(st.binary(max_size=300))
def test_garbage_never_raises_anything_else(context: ssl.SSLContext, data: bytes) -> None:
    for at_once in (1, 1000):
        server_end = Tls(context, direct=True)
        try:
            assert feed(server_end, data, at_once) == b""
        except ProtocolError:
            pass


def test_both_forms_start_tls() -> None:
    """After SSLRequest, or with the first bytes; a second request is an error."""
    hello = b"\x16\x03\x01\x02\x00"
    for chunk, event in ((untyped(SSL_CODE), Secure(b"S", b"")), (hello, Secure(b"", hello))):
        negotiation = Negotiation(tls=True)
        negotiation.receive(chunk)
        assert negotiation.next_event() == event
        negotiation.receive(HELLO)
        assert isinstance(negotiation.next_event(), Startup)
        for again in (untyped(SSL_CODE), hello):
            twice = Negotiation(tls=True)
            twice.receive(chunk)
            twice.next_event()
            twice.receive(again)
            with pytest.raises(ProtocolError):
                twice.next_event()


def test_direct_tls_without_a_certificate_is_refused() -> None:
    negotiation = Negotiation()
    negotiation.receive(b"\x16")
    with pytest.raises(NoTlsError):
        negotiation.next_event()


def test_bytes_after_the_request_are_fatal() -> None:
    """An attacker between client and daemon could have added them (CVE-2021-23222)."""
    negotiation = Negotiation(tls=True)
    negotiation.receive(untyped(SSL_CODE) + b"\x16")
    with pytest.raises(ProtocolError) as caught:
        negotiation.next_event()
    assert caught.value.sqlstate == "08P01"
