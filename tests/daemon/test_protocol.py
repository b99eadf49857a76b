"""The daemon's protocol, packet by packet: its reaction to each message that may arrive.

The tests cover requests for encryption, versions, cancels, parameters, invalid start-ups, slow
clients, messages after the start-up, and refusals. Working encryption and passwords have their own
tests (test_listeners.py), as have cancels under load (test_cancels.py), the relay (test_relay.py),
and full disks (test_full_disks.py).
"""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import product
from pathlib import Path

import asyncpg
import psycopg
import pytest

from conftest import VERSIONS, need_version
from pgtemp.programs.installation import Installation
from pgtemp.wire.messages import (
    CANCEL_CODE,
    GSSENC_CODE,
    PROTOCOL_3,
    SSL_CODE,
    TERMINATE,
    Frames,
    cancel_request,
    frame,
    startup_message,
    untyped,
)
from rawclient import Client, RefusedError, SqlError, dial, error_fields, read_to_the_end
from support import Daemon, eventually, own_memory

DaemonType = type[Daemon]
HELLO = startup_message({"user": "postgres", "database": "test"})
WHICH = frame(b"Q", b"SELECT current_database()\0")
STARTING = 1000  # clients that may be starting at once
SSL, GSS = untyped(SSL_CODE), untyped(GSSENC_CODE)
CLUSTER = ("--isolation", "cluster", "--pool", "0")


def connect_raw(served: Daemon) -> socket.socket:
    return dial(("127.0.0.1", served.port))


def answer(served: Daemon, *pieces: bytes) -> bytes:
    """The complete answer of the daemon to a client that sends this and closes its side."""
    with connect_raw(served) as client:
        with suppress(ConnectionError):
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
        return read_to_the_end(client)


def messages(data: bytes) -> list[tuple[bytes, bytes]]:
    return list(Frames().feed(data))


def refused(data: bytes) -> dict[str, str]:
    """The fields of an answer that consists of one ErrorResponse."""
    ((kind, payload),) = messages(data)
    assert kind == b"E"
    fields = error_fields(payload)
    assert fields["S"] == fields["V"] == "FATAL"
    return fields


def count_leases(errors: str) -> int:
    """The number of leases in the daemon's log."""
    return errors.count("lived_s")


def serves(served: Daemon) -> bool:
    """Whether the next client is served."""
    with psycopg.connect(served.uri) as connection:
        return connection.execute("SELECT 1").fetchone() == (1,)


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """A daemon for many tests; it must not have logged a traceback."""
    served = Daemon("--log-level", "info")
    Daemon.running.discard(served)  # otherwise the other fixture would stop it with each test
    yield served
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors


# SSLRequest, GSSENCRequest, without a certificate


@pytest.mark.parametrize("asked", [[SSL], [GSS], [SSL, GSS], [GSS, SSL]])
def test_encryption_is_refused_in_one_byte_each(shared: Daemon, asked: list[bytes]) -> None:
    """Each request is answered N, in either order, even if it arrives byte by byte.

    A client that continues without encryption is served.
    """
    with connect_raw(shared) as client:
        for request in asked:
            for byte in request:
                client.sendall(bytes([byte]))
            assert client.recv(100) == b"N"
        for byte in HELLO:
            client.sendall(bytes([byte]))
        assert client.recv(1) == b"R"


@pytest.mark.parametrize("request_", [SSL, GSS])
def test_encryption_is_refused_once(shared: Daemon, request_: bytes) -> None:
    with connect_raw(shared) as client:
        client.sendall(request_)
        assert client.recv(100) == b"N"
        client.sendall(request_)
        assert refused(read_to_the_end(client))["C"] == "08P01"


def test_bytes_after_a_request_for_encryption(daemon: DaemonType) -> None:
    """An attacker between client and daemon could have added them: they cause an error."""
    served = daemon("--pool", "0", "--log-level", "info")
    for request in (SSL, GSS):
        assert refused(answer(served, request + HELLO + WHICH))["C"] == "08P01"
    assert count_leases(served.end()[1]) == 0


def test_a_client_that_requires_encryption_gets_its_librarys_error(shared: Daemon) -> None:
    with pytest.raises(psycopg.OperationalError, match="server does not support SSL"):
        psycopg.connect(shared.uri, sslmode="require")
    with pytest.raises(psycopg.OperationalError, match="GSS"):
        psycopg.connect(shared.uri, gssencmode="require")


# versions


def test_the_server_negotiates_minor_versions_and_extensions(
    daemon: DaemonType, any_version: str
) -> None:
    """The client gets the server's NegotiateProtocolVersion message, and then the login goes on."""
    served = daemon("--pg-version", any_version)
    for minor, extensions in product((0, 2, 9999), ({}, {"_pq_.pgtemp": "1"})):
        known = int(any_version) >= 18 and minor == 2  # PostgreSQL supports 3.2 since 18
        hello = startup_message({"user": "postgres", **extensions}, PROTOCOL_3 + minor)
        replies = messages(answer(served, hello, WHICH, TERMINATE))
        kinds = b"".join(kind for kind, _ in replies)
        assert kinds.endswith(b"ZTDCZ")
        assert (b"v" in kinds) == bool(extensions or (minor and not known)), kinds
        if extensions:
            (named,) = (payload for kind, payload in replies if kind == b"v")
            assert named[4:] == b"\0\0\0\1_pq_.pgtemp\0"
        (key,) = (payload for kind, payload in replies if kind == b"K")
        assert len(key) == (36 if int(any_version) >= 18 and minor else 8)


@pytest.mark.parametrize("minor", [0, 2, 9999])
def test_the_daemon_negotiates_in_logins_that_it_answers_itself(shared: Daemon, minor: int) -> None:
    probe = {"user": "me", "application_name": "pg_isready", "_pq_.pgtemp": "1"}
    hello = startup_message(probe, PROTOCOL_3 + minor)
    replies = messages(answer(shared, hello, TERMINATE))
    assert [kind for kind, _ in replies] == [b"v", b"R", b"S", b"S", b"K", b"Z"]
    assert int.from_bytes(replies[0][1][:4], "big") == PROTOCOL_3 + min(minor, 2)


@pytest.mark.parametrize("version", [1, 2, 4])
def test_other_protocols_are_refused(shared: Daemon, version: int) -> None:
    fields = refused(answer(shared, startup_message({"user": "me"}, version << 16)))
    assert fields["C"] == "0A000" and f"{version}.0" in fields["M"]


# CancelRequest


def test_a_cancel_reaches_the_backend_that_has_the_key(daemon: DaemonType) -> None:
    """Keys have 4 bytes, or 32 with protocol 3.2. A refused request for encryption may precede."""
    served = daemon("--pg-version", str(need_version(max(VERSIONS))))
    for minor, before in product((0, 2), (b"", SSL, GSS)):
        with connect_raw(served) as client:
            client.sendall(startup_message({"user": "postgres"}, PROTOCOL_3 + minor))
            client.sendall(frame(b"Q", b"SELECT pg_sleep(600)\0"))
            frames = Frames()
            key = _next(client, frames, b"K")
            assert len(key) == (36 if minor else 8)
            activity = Path(f"/proc/{int.from_bytes(key[:4], 'big')}/cmdline")
            assert eventually(lambda at=activity: b"SELECT" in at.read_bytes())  # type: ignore[misc]
            with connect_raw(served) as canceller:
                if before:
                    canceller.sendall(before)
                    assert canceller.recv(1) == b"N"
                canceller.sendall(cancel_request(key))
                assert read_to_the_end(canceller) == b""
            assert error_fields(_next(client, frames, b"E"))["C"] == "57014"


def _next(client: socket.socket, frames: Frames, wanted: bytes) -> bytes:
    """The payload of the next message of a type; other messages that arrive with it are dropped."""
    while True:
        for kind, payload in frames.feed(client.recv(65536)):
            if kind == wanted:
                return payload


def test_an_unknown_cancel_key_gets_no_answer(daemon: DaemonType) -> None:
    """The daemon closes the connection, whatever the size of the key, valid or not."""
    served = daemon("--pool", "0", "--log-level", "info")
    for size in (8, 36, 260, 0, 7, 261, 5000):
        assert answer(served, untyped(CANCEL_CODE, b"\xff" * size)) == b""
    _, errors = served.end()
    assert errors.count("an unknown key") == 3
    assert errors.count("invalid cancel request: the key has") == 4


# replication


def test_physical_replication_from_a_shared_server_is_refused(daemon: DaemonType) -> None:
    """A base backup would contain the databases of all clients."""
    served = daemon("--pool", "0", "--log-level", "info")
    for value in ("true", "t", "on", "1", "yes", "y", "TRUE"):
        hello = startup_message({"user": "postgres", "replication": value})
        fields = refused(answer(served, hello))
        assert fields["C"] == "0A000" and "--isolation cluster" in fields["H"]
    assert count_leases(served.end()[1]) == 0


def test_physical_replication_from_a_server_per_lease_works(daemon: DaemonType) -> None:
    served = daemon(*CLUSTER)
    with psycopg.connect(served.uri, replication="true", autocommit=True) as connection:
        assert connection.execute("IDENTIFY_SYSTEM").fetchone() is not None


@pytest.mark.parametrize("arguments", [(), CLUSTER])
def test_replication_of_a_database_works_like_any_connection(
    daemon: DaemonType, arguments: tuple[str, ...]
) -> None:
    served = daemon(*arguments)
    with psycopg.connect(served.uri, replication="database", autocommit=True) as connection:
        assert connection.execute("IDENTIFY_SYSTEM").fetchone() is not None
        row = connection.execute("SELECT current_database()").fetchone()
        assert row is not None and (arguments or row[0].startswith("lease_"))


# parameters


def test_options_and_settings_are_passed_through(shared: Daemon) -> None:
    """A parameter is a value and never SQL; the server itself reports an invalid one."""
    odd = 'it\'s "quoted"; DROP DATABASE test; -- \\ $$ \u00e4'
    with psycopg.connect(
        shared.uri, application_name=odd, options="-c work_mem=5MB --lock-timeout=7s"
    ) as connection:
        row = connection.execute(
            "SELECT current_setting('work_mem'), current_setting('lock_timeout'),"
            " current_setting('application_name')"
        ).fetchone()
        # PostgreSQL replaces characters there that are not ASCII, before 18 with question marks.
        assert row is not None and row[:2] == ("5MB", "7s")
        assert row[2].startswith(odd[:45].rstrip("\u00e4"))
    with Client(("127.0.0.1", shared.port), user=odd, database=odd) as client:
        assert client.query("SELECT current_user") == [(odd,)]
    fields = refused_by_server(shared, {"options": "-c nonsense=1"})
    assert fields["C"] == "42704"


def refused_by_server(served: Daemon, more: dict[str, str]) -> dict[str, str]:
    replies = messages(answer(served, startup_message({"user": "postgres", **more})))
    assert [kind for kind, _ in replies] == [b"R", b"E"]
    return error_fields(replies[1][1])


@pytest.mark.parametrize("arguments", [(), CLUSTER])
def test_a_database_given_twice_reaches_the_server_once(
    daemon: DaemonType, arguments: tuple[str, ...]
) -> None:
    """The last name counts, as in PostgreSQL. The server gets one name: the allocation's."""
    served = daemon(*arguments)
    both = b"user\0postgres\0database\0postgres\0database\0two\0\0"
    replies = dict(messages(answer(served, untyped(PROTOCOL_3, both), WHICH, TERMINATE)))
    name = replies[b"D"][6:].decode()
    assert name.startswith("lease_") if not arguments else name == "two"


def of_size(size: int, dbname: str = "d") -> bytes:
    """A StartupMessage of a given number of bytes."""
    parameters = {"user": "postgres", "database": dbname, "application_name": ""}
    missing = size - len(startup_message(parameters))
    made = startup_message({**parameters, "application_name": "x" * missing})
    assert len(made) == size
    return made


def test_a_packet_over_10000_bytes(daemon: DaemonType) -> None:
    """The daemon refuses it as soon as it has its length.

    It also refuses a packet that becomes too long with the allocation's database name.
    """
    served = daemon("--log-level", "info")
    assert b"Z" in dict(messages(answer(served, of_size(9900), TERMINATE)))
    assert refused(answer(served, of_size(10_001)))["C"] == "08P01"
    assert refused(answer(served, (10_001).to_bytes(4, "big")))["C"] == "08P01"
    assert refused(answer(served, of_size(10_000)))["C"] == "08P01"
    with connect_raw(served) as waits:  # it waits for its answer and does not close its side
        waits.sendall(of_size(10_000))
        assert refused(read_to_the_end(waits))["C"] == "08P01"
    assert serves(served)
    assert "Traceback" not in served.end()[1]


def test_memory_is_used_only_for_bytes_that_arrived(daemon: DaemonType) -> None:
    """Hundreds of clients announce the longest allowed packet and send only a part of it."""
    served = daemon("--pool", "0")
    before = own_memory(served.process.pid)
    with ExitStack() as held:
        for _ in range(500):
            held.enter_context(client := connect_raw(served)).sendall((10_000).to_bytes(4, "big"))
        with connect_raw(served) as last:
            last.sendall(cancel_request(bytes(8)))
            # so the daemon has read all earlier connections, too
            assert read_to_the_end(last) == b""
        assert (own_memory(served.process.pid) - before) / 500 < 8_000
        assert client.fileno() > 0


# invalid start-ups


def test_a_foreign_protocol_is_closed_with_a_line_in_the_log(daemon: DaemonType) -> None:
    served = daemon("--pool", "0", "--log-level", "info")
    foreign = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"SSH-2.0-x\r\n", b"*1\r\n$4\r\nPING\r\n"]
    foreign += [b"\0\0\0\4", bytes(8), b"\xff" * 20, (1 << 20).to_bytes(4, "big"), b"\r\n\r\n"]
    for data in foreign:
        with connect_raw(served) as client:
            client.sendall(data)
            assert read_to_the_end(client) == b""
    lines = served.end()[1].splitlines()
    assert len(lines) == len(foreign)
    assert all("not PostgreSQL's protocol" in line for line in lines)


@pytest.mark.parametrize(
    ("body", "sqlstate"),
    [
        (b"user\0me\0", "08P01"),  # no terminator
        (b"user\0me", "08P01"),
        (b"", "08P01"),
        (b"user\0\0", "08P01"),  # a name without a value
        (b"user\0me\0\0x", "08P01"),  # bytes after the terminator
        (b"user\0me\0\0x\0\0", "08P01"),
        (b"\0", "28000"),  # no user
        (b"database\0x\0\0", "28000"),
        (b"user\0a\xff\0\0", "22021"),  # names have to be text
        (b"user\0me\0database\0a\xff\0\0", "22021"),
    ],
)
def test_an_invalid_start_up_packet(shared: Daemon, body: bytes, sqlstate: str) -> None:
    assert refused(answer(shared, untyped(PROTOCOL_3, body)))["C"] == sqlstate


# slow clients


@pytest.mark.slow
def test_a_start_up_has_ten_seconds_in_total(daemon: DaemonType) -> None:
    """No byte extends the time of a silent or slow client, even after a request for encryption."""
    served = daemon("--pool", "0", "--log-level", "info")
    with ExitStack() as held:
        silent, slow, asked = (held.enter_context(connect_raw(served)) for _ in range(3))
        asked.sendall(SSL)
        assert asked.recv(1) == b"N"
        start = time.monotonic()
        for client in (slow, asked):
            client.setblocking(False)
        drip = iter(of_size(9000))
        while time.monotonic() - start < 30:
            byte = bytes([next(drip)])
            with suppress(OSError):
                slow.send(byte)
            with suppress(OSError):
                asked.send(byte)
            if all(_is_closed(client) for client in (slow, asked)):
                break
            time.sleep(0.1)  # the slowness that the test is about
        assert time.monotonic() - start < 25
        assert read_to_the_end(silent) == b""
    _, errors = served.end()
    assert errors.count("did not finish its start-up") == 3 and count_leases(errors) == 0


def _is_closed(client: socket.socket) -> bool:
    try:
        return client.recv(100) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_many_clients_that_connect_at_once_are_accepted(daemon: DaemonType) -> None:
    """Hundreds connect while the daemon is busy; a short queue would delay some by a second."""
    served = daemon("--pool", "0")
    served.process.send_signal(signal.SIGSTOP)
    with ExitStack() as held:
        try:
            crowd = [held.enter_context(connect_raw(served)) for _ in range(500)]
        finally:
            served.process.send_signal(signal.SIGCONT)
        for client in crowd:
            client.sendall(SSL)
        assert [client.recv(2) for client in crowd] == [b"N"] * 500


def test_the_limit_of_clients_that_are_starting_up(daemon: DaemonType) -> None:
    """Further clients get an error and can read it; a client that leaves makes room for another."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 3 * STARTING:
        pytest.skip("too few open files are allowed here")
    served = daemon("--pool", "0", "--log-level", "info")
    with ExitStack() as held:
        starting = [held.enter_context(connect_raw(served)) for _ in range(STARTING)]
        for _ in range(20):
            assert refused(answer(served, HELLO, WHICH))["C"] == "53300"
        starting[0].close()
        assert eventually(lambda: len(answer(served, HELLO, TERMINATE)) > 300)
    assert eventually(lambda: serves(served))
    assert served.end()[0] == 0


# after the start-up


@pytest.mark.parametrize("arguments", [(), CLUSTER])
def test_statements_sent_with_the_start_up_packet_arrive_in_order(
    daemon: DaemonType, arguments: tuple[str, ...]
) -> None:
    """They arrive in one piece with it, before the server exists, followed by Terminate."""
    served = daemon(*arguments)
    queries = [f"SELECT {number}" for number in range(2000)]
    sent = b"".join(frame(b"Q", query.encode() + b"\0") for query in queries)
    replies = messages(answer(served, HELLO + sent + TERMINATE))
    rows = [payload[6:].decode() for kind, payload in replies if kind == b"D"]
    assert rows == [str(number) for number in range(2000)]


def test_a_half_closed_client_gets_its_answer(shared: Daemon) -> None:
    """A half-close is passed on; both sides are closed after the other direction has drained."""
    query = frame(b"Q", b"SELECT repeat('x', 10000000), pg_sleep(0.2)\0")
    replies = messages(answer(shared, HELLO, query))
    assert [len(payload) > 10_000_000 for kind, payload in replies if kind == b"D"] == [True]
    assert replies[-1] == (b"Z", b"I")


def test_probes_use_no_lease(daemon: DaemonType, programs: Installation) -> None:
    """pg_isready, empty connections of load balancers and reset ones are answered or closed."""
    served = daemon("--log-level", "info")
    isready = programs.bin_dir / "pg_isready"
    if isready.exists():
        at = ["-h", "localhost", "-p", str(served.port)]
        subprocess.run([isready, *at], capture_output=True, check=True)
    probe = startup_message({"user": "me", "application_name": "pg_isready"})
    assert [kind for kind, _ in messages(answer(served, probe, TERMINATE))][-1] == b"Z"
    assert answer(served) == answer(served, HELLO[:5]) == b""
    assert answer(served, SSL) == b"N"
    with connect_raw(served) as client:
        client.sendall(HELLO[:5])
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    status, errors = served.end()
    assert status == 0 and count_leases(errors) == 0
    assert "Traceback" not in errors


def test_a_client_that_only_logs_in_uses_no_database(daemon: DaemonType) -> None:
    """If a client sends Terminate or closes right after the login, the next gets its database."""
    served = daemon("--pool", "1", "--log-level", "info")
    for _ in range(2):
        psycopg.connect(served.uri).close()
        answer(served, HELLO)
        answer(served, HELLO + TERMINATE)
    _, errors = served.end()
    assert errors.count("used False") == count_leases(errors) == 6


def test_target_session_attrs(shared: Daemon) -> None:
    """The daemon passes on the server's parameters, by which libpq recognizes a primary."""
    for wanted in ("any", "read-write", "primary", "prefer-standby"):
        with psycopg.connect(shared.uri, target_session_attrs=wanted) as connection:
            assert connection.info.parameter_status("in_hot_standby") == "off"
    with pytest.raises(psycopg.OperationalError, match="not in hot standby mode"):
        psycopg.connect(shared.uri, target_session_attrs="standby")


# refusals


def test_the_name_of_another_clients_database_is_refused(shared: Daemon) -> None:
    with psycopg.connect(shared.uri) as owner:
        row = owner.execute("SELECT current_database()").fetchone()
        assert row is not None
        fields = refused(answer(shared, startup_message({"user": "postgres", "database": row[0]})))
        assert fields["C"] == "3D000"


@pytest.mark.parametrize(
    ("arguments", "dbname", "sqlstate", "hint"),
    [
        (("--max-databases", "1", "--wait", "0"), "test", "53300", "raise --max-databases"),
        (("--max-connections-per-lease", "1"), "test~s", "53300", "--max-connections-per-lease"),
        ((), "test~", "3D000", "/DBNAME~SESSION"),
        (("--single",), "nowhere", "3D000", None),
    ],
)
def test_a_refused_client_gets_the_complete_reason(
    daemon: DaemonType, arguments: tuple[str, ...], dbname: str, sqlstate: str, hint: str | None
) -> None:
    """The error has a hint that drivers show, even if the client has already sent much data."""
    served = daemon(*arguments)
    used_dbname = dbname if sqlstate == "53300" else "test"
    uri = served.uri.replace("/test", f"/{dbname}")

    async def use() -> None:
        await asyncpg.connect(uri)

    with psycopg.connect(served.uri.replace("/test", f"/{used_dbname}")):
        hello = startup_message({"user": "postgres", "database": dbname})
        for behind in (b"", WHICH, WHICH * 30_000):
            replies = messages(answer(served, hello + behind))
            (fields,) = (error_fields(payload) for kind, payload in replies if kind == b"E")
            assert fields["C"] == sqlstate
            assert hint is None or hint in fields["H"]
        with pytest.raises(psycopg.OperationalError) as by_libpq:
            psycopg.connect(uri)
        with pytest.raises(asyncpg.PostgresError) as by_asyncpg:
            asyncio.run(use())
    assert by_asyncpg.value.sqlstate == sqlstate
    if hint is not None:
        assert hint in str(by_libpq.value) and hint in (by_asyncpg.value.hint or "")


def test_connected_clients_get_an_error_when_the_daemon_stops(daemon: DaemonType) -> None:
    served = daemon()
    with Client(("127.0.0.1", served.port), user="postgres") as client:
        assert client.query("SELECT 1") == [("1",)]
        assert served.end() == (0, "")
        replies = messages(read_to_the_end(client.socket))
        assert replies and error_fields(replies[0][1])["C"] == "57P01"


def test_the_servers_own_refusal_reaches_the_client(shared: Daemon) -> None:
    """The error arrives complete, as a client sees that checks every field."""
    with pytest.raises(RefusedError, match="22023"):
        Client(("127.0.0.1", shared.port), user="postgres", work_mem="none")
    with Client(("127.0.0.1", shared.port), user="postgres") as client:
        with pytest.raises(SqlError, match="42601"):
            client.query("nonsense")
        assert client.query("SELECT 1") == [("1",)]
