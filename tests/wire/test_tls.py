"""TLS as conversations between two ends in memory."""

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


class Far:
    """A client's end."""

    def __init__(self, authority: trustme.CA, alpn: str | None = ALPN) -> None:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        if alpn is not None:
            context.set_alpn_protocols([alpn])
        self._arrived, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._arrived, self._to_send, server_hostname="localhost")

    def shake(self, near: Tls, *, at_once: int) -> bytes:
        """The handshake, in pieces of so many bytes; the plaintext that came out meanwhile."""
        plain = b""
        for _ in range(5):
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                pass
            plain += feed(near, self._to_send.read(), at_once)
            self._arrived.write(near.take())
        self.tls.do_handshake()
        return plain

    def says(self, data: bytes) -> bytes:
        self.tls.write(data)
        return self._to_send.read()

    def hears(self, data: bytes) -> bytes:
        self._arrived.write(data)
        heard = b""
        try:
            while part := self.tls.read(1 << 16):
                heard += part
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        return heard

    def leaves(self) -> bytes:
        try:
            self.tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        return self._to_send.read()


def feed(near: Tls, data: bytes, at_once: int) -> bytes:
    return b"".join(near.receive(data[i : i + at_once]) for i in range(0, len(data), at_once))


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
    """A handshake, words both ways and both goodbyes, a byte at a time or in one piece."""
    near, far = Tls(context, direct=direct), Far(authority)
    assert far.shake(near, at_once=at_once) == b""
    said = bytes(range(256)) * 500
    assert feed(near, far.says(said), at_once) == said
    assert far.hears(near.encrypt(said)) == said
    assert near.encrypt(b"") == b"" and not near.ended
    assert feed(near, far.leaves(), at_once) == b"" and near.ended
    assert far.hears(near.encrypt(b"afterwards")) == b"afterwards"
    assert near.finish() != b""


def test_who_was_said_goodbye_to_may_go_on(authority: trustme.CA, context: ssl.SSLContext) -> None:
    """It has not heard it yet; what it still says is no error."""
    near, far = Tls(context, direct=False), Far(authority)
    far.shake(near, at_once=1000)
    goodbye = near.finish()
    near.receive(far.says(b"still here"))
    assert far.hears(goodbye) == b""


def test_what_follows_a_goodbye_is_not_kept(authority: trustme.CA, context: ssl.SSLContext) -> None:
    """Nor what follows garbage: the memory of the daemon is not the client's."""
    for last in ("goodbye", "garbage"):
        near, far = Tls(context, direct=False), Far(authority)
        far.shake(near, at_once=1000)
        if last == "goodbye":
            near.receive(far.leaves())
        else:
            with pytest.raises(ProtocolError):
                near.receive(b"\x17\x03\x03\x00\x30" + bytes(48))
        tracemalloc.start()
        try:
            for _ in range(64):
                assert near.receive(bytes(1 << 16)) == b"" and near.ended
            assert tracemalloc.get_traced_memory()[0] < 1 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(("direct", "alpn", "fits"), [
    (True, ALPN, True), (True, None, False), (False, None, True), (False, ALPN, True),
])  # fmt: skip
def test_begun_directly_it_names_the_protocol(
    authority: trustme.CA, context: ssl.SSLContext, direct: bool, alpn: str | None, fits: bool
) -> None:
    near, far = Tls(context, direct=direct), Far(authority, alpn)
    if fits:
        far.shake(near, at_once=1000)
    else:
        with pytest.raises(ProtocolError, match="application protocol"):
            far.shake(near, at_once=1000)


@given(st.binary(max_size=300))
def test_garbage_never_raises_anything_else(context: ssl.SSLContext, data: bytes) -> None:
    for at_once in (1, 1000):
        near = Tls(context, direct=True)
        try:
            assert feed(near, data, at_once) == b""
        except ProtocolError:
            pass


def test_both_forms_begin_it() -> None:
    """After SSLRequest, and with the first bytes; neither comes twice."""
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


def test_without_a_certificate_it_is_refused() -> None:
    negotiation = Negotiation()
    negotiation.receive(b"\x16")
    with pytest.raises(NoTlsError):
        negotiation.next_event()


def test_bytes_behind_the_request_are_fatal() -> None:
    """Somebody in between could have put them there (CVE-2021-23222)."""
    negotiation = Negotiation(tls=True)
    negotiation.receive(untyped(SSL_CODE) + b"\x16")
    with pytest.raises(ProtocolError) as caught:
        negotiation.next_event()
    assert caught.value.sqlstate == "08P01"
