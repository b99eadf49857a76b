"""The relay: all bytes arrive in order in both directions, and the daemon buffers few of them."""

from __future__ import annotations

import hashlib
import select
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import pq

from conftest import need_version
from pgtemp.programs.installation import Installation
from pgtemp.wire.messages import TERMINATE, frame, startup_message
from rawclient import Client, SqlError, dial, error_fields, read_to_the_end
from support import Daemon, eventually, own_memory

DaemonType = type[Daemon]
ROOM = 16 << 20  # bytes that the daemon may use for the data it relays
ROWS = 33_600  # of 32,001 bytes each: more than 1 GB
CLUSTER = ("--isolation", "cluster", "--pool", "0")
SYNC = frame(b"S")


@pytest.fixture(scope="module", params=[15, 18])
def shared(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A daemon for many tests; it must not have logged a traceback."""
    served = Daemon("--log-level", "info", "--pg-version", str(need_version(request.param)))
    Daemon.running.discard(served)  # otherwise the other fixture would stop it with each test
    yield served
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors


def at(served: Daemon, dbname: str) -> str:
    return f"postgresql://postgres@127.0.0.1:{served.port}/{dbname}"


def raw(served: Daemon, dbname: str = "test", **parameters: str) -> Client:
    address = ("127.0.0.1", served.port)
    return Client(address, user="postgres", database=dbname, **parameters)


def waits(looker: psycopg.Connection, event: str) -> bool:
    """Whether the server reports that a backend waits for its client."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = %s"
    row = looker.execute(query, [event]).fetchone()
    return row == (1,)


def row(number: int) -> bytes:
    return hashlib.md5(str(number).encode()).hexdigest().encode() * 1000 + b"\n"


# large amounts, slowly


@pytest.mark.slow
def test_a_gigabyte_to_a_slow_client(daemon: DaemonType) -> None:
    """All bytes arrive. While the client pauses, the server waits and the daemon buffers little."""
    served = daemon()
    with psycopg.connect(served.uri, autocommit=True) as looker, raw(served) as client:
        before = own_memory(served.process.pid)
        expected, got = hashlib.sha256(), hashlib.sha256()
        client.ask(
            f"COPY (SELECT repeat(md5(n::text), 1000) FROM generate_series(1, {ROWS}) n) TO STDOUT"
        )
        assert client.next()[0] == b"H"
        for number in range(1, ROWS + 1):
            if number % (ROWS // 5) == 1:
                assert eventually(lambda: waits(looker, "ClientWrite"))
                assert own_memory(served.process.pid) - before < ROOM
            kind, payload = client.next()
            assert kind == b"d"
            got.update(payload)
            expected.update(row(number))
        assert [client.next()[0] for _ in range(3)] == [b"c", b"C", b"Z"]
        assert got.digest() == expected.digest()
        assert own_memory(served.process.pid) - before < ROOM


@pytest.mark.slow
def test_a_gigabyte_to_a_slow_server(daemon: DaemonType) -> None:
    """The server compares each row on arrival; while it waits, the client waits too."""
    served = daemon()
    with (
        psycopg.connect(at(served, "test~s"), autocommit=True) as holder,
        raw(served, "test~s") as client,
    ):
        holder.execute("CREATE SEQUENCE counted")
        holder.execute("CREATE UNLOGGED TABLE wrong (n int, line text)")
        holder.execute("CREATE FUNCTION pause(n int) RETURNS text LANGUAGE sql AS 'SELECT CASE WHEN"
                       " n % 8000 = 1 THEN pg_advisory_xact_lock_shared(1)::text END'")  # fmt: skip
        holder.execute("SELECT pg_advisory_lock(1)")
        before = own_memory(served.process.pid)
        # Rows that are as expected are not stored.
        client.ask("COPY wrong FROM STDIN WHERE pause(n) = 'never'"
                   " OR n <> nextval('counted') OR line <> repeat(md5(n::text), 1000)")  # fmt: skip
        assert client.next()[0] == b"G"
        paused = False
        for number in range(1, ROWS + 1):
            data = frame(b"d", b"%d\t" % number + row(number))
            if not paused and (data := _send_until_blocked(client.socket, data)):
                paused = True
                assert eventually(lambda: waits(holder, "advisory"))
                assert own_memory(served.process.pid) - before < ROOM
                holder.execute("SELECT pg_advisory_unlock(1)")
            if data:
                client.socket.sendall(data)
        client.send(b"c")
        assert client.answer() == []
        assert own_memory(served.process.pid) - before < ROOM
        assert paused
        assert client.query("SELECT last_value FROM counted") == [(str(ROWS),)]
        assert client.query("SELECT count(*) FROM wrong") == [("0",)]


def _send_until_blocked(connection: socket.socket, data: bytes) -> bytes:
    """Send data; return the rest once the daemon has accepted nothing for a second."""
    while data:
        _, able, _ = select.select([], [connection], [], 1.0)
        if not able:
            return data
        data = data[connection.send(data, socket.MSG_DONTWAIT) :]
    return b""


@pytest.mark.slow
def test_a_value_of_256_megabytes_in_both_directions(shared: Daemon) -> None:
    value = bytes(range(256)) * (1 << 20)
    before = own_memory(shared.process.pid)
    with psycopg.connect(shared.uri) as connection:
        cursor = connection.cursor(binary=True)
        cursor.execute("SELECT %b::bytea, sha256(%b::bytea)", [value, value[:1000]])
        found = cursor.fetchone()
        assert found is not None and found[0] == value
        assert found[1] == hashlib.sha256(value[:1000]).digest()
    assert own_memory(shared.process.pid) - before < ROOM


def test_one_byte_at_a_time_in_both_directions(shared: Daemon) -> None:
    """The client sends hundreds of statements, and reads thousands of rows, byte by byte."""
    query = frame(b"Q", b"SELECT 1\0")
    with dial(("127.0.0.1", shared.port)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in startup_message({"user": "postgres"}) + query * 300 + TERMINATE:
            client.send(bytes([byte]))
        answer = read_to_the_end(client)
    assert answer.count(b"SELECT 1\0Z\0\0\0\5I") == 300
    with dial(("127.0.0.1", shared.port)) as client:
        client.sendall(startup_message({"user": "postgres"}))
        client.sendall(frame(b"Q", b"SELECT n FROM generate_series(1, 3000) n\0") + TERMINATE)
        answer = b"".join(iter(lambda: client.recv(1), b""))
    assert answer.endswith(frame(b"D", b"\0\1\0\0\0\0043000") + frame(b"C", b"SELECT 3000\0")
                         + frame(b"Z", b"I"))  # fmt: skip


def test_a_row_of_1600_columns(shared: Daemon) -> None:
    columns = ", ".join(f"c{number} int DEFAULT {number}" for number in range(1600))
    with psycopg.connect(shared.uri) as connection:
        connection.execute(f"CREATE TABLE wide ({columns})")  # type: ignore[arg-type]
        connection.execute("INSERT INTO wide DEFAULT VALUES")
        assert connection.execute("SELECT * FROM wide").fetchone() == tuple(range(1600))


# half-closed and interrupted connections


def test_a_half_closed_client_receives_everything(shared: Daemon) -> None:
    """A client that has shut down writing reads megabytes slowly, to the last byte."""
    query = "SELECT repeat('x', 1000) FROM generate_series(1, 50000)"
    with dial(("127.0.0.1", shared.port)) as client:
        client.sendall(startup_message({"user": "postgres"}) + frame(b"Q", query.encode() + b"\0"))
        client.shutdown(socket.SHUT_WR)
        with psycopg.connect(shared.uri, autocommit=True) as looker:
            assert eventually(lambda: waits(looker, "ClientWrite"))
        answer = read_to_the_end(client)
    assert answer.endswith(frame(b"C", b"SELECT 50000\0") + frame(b"Z", b"I"))
    assert answer.count(b"x" * 1000) == 50000


def test_a_client_that_keeps_writing_reads_the_servers_last_error(shared: Daemon) -> None:
    """If a backend exits while its client sends, the client reads the reason and then the end."""
    with raw(shared, "test~end") as client, psycopg.connect(at(shared, "test~end")) as other:
        client.query("CREATE UNLOGGED TABLE t (line text)")
        client.ask("COPY t FROM STDIN")
        assert client.next()[0] == b"G"
        pid = int.from_bytes(client.key[:4], "big")
        other.execute("SELECT pg_terminate_backend(%s)", [pid])
        try:
            while not select.select([client.socket], [], [], 0)[0]:
                client.socket.sendall(frame(b"d", b"more\n"))
            for _ in range(100):
                client.socket.sendall(frame(b"d", b"x" * 100_000))
        except ConnectionError:
            pass
        assert other.execute("SELECT 1").fetchone() == (1,)
    with raw(shared, "test~end") as client, psycopg.connect(at(shared, "test~end")) as other:
        other.execute("SELECT pg_terminate_backend(%s)", [int.from_bytes(client.key[:4], "big")])
        kind, payload = client.next()
        assert kind == b"E" and error_fields(payload)["C"] == "57P01"
        assert read_to_the_end(client.socket) == b""


# each part of the protocol


def test_an_error_during_copy(shared: Daemon) -> None:
    """The data or the client causes the error; data sent after it is skipped, as usual."""
    with raw(shared) as client:
        client.query("CREATE TABLE t (n int)")
        for middle, sqlstate in ((frame(b"d", b"x\n"), "22P02"), (frame(b"f", b"no\0"), "57014")):
            client.ask("COPY t FROM STDIN")
            assert client.answer() == []
            lines = frame(b"d", b"1\n") * 50_000
            client.canceled = True  # COPY reports its client's failure with this SQLSTATE
            client.socket.sendall(lines + middle)
            if sqlstate == "22P02":
                client.socket.sendall(lines + frame(b"c"))
            with pytest.raises(SqlError, match=sqlstate):
                client.answer()
            assert client.query("SELECT count(*) FROM t") == [("0",)]


def test_notifications_reach_the_clients_of_a_session(shared: Daemon) -> None:
    """A silent client of the same session gets them; a client of another session does not."""
    with (
        psycopg.connect(at(shared, "test~n"), autocommit=True) as listener,
        psycopg.connect(at(shared, "test~n"), autocommit=True) as speaker,
        psycopg.connect(at(shared, "test~m"), autocommit=True) as stranger,
    ):
        for connection in (listener, stranger):
            connection.execute("LISTEN news")
        for number in range(1000):
            speaker.execute("SELECT pg_notify('news', %s)", [str(number) + "x" * 1000])
        received = list(listener.notifies(timeout=30, stop_after=1000))
        assert [int(one.payload.rstrip("x")) for one in received] == list(range(1000))
        assert list(stranger.notifies(timeout=0)) == []


def test_pipelines(shared: Daemon) -> None:
    """libpq's pipeline mode, with an error in the middle."""
    with psycopg.connect(shared.uri, autocommit=True) as connection:
        with connection.pipeline():
            cursors = [connection.execute("SELECT %s::int", [number]) for number in range(2000)]
        assert [cursor.fetchone() for cursor in cursors] == [(number,) for number in range(2000)]
        with pytest.raises(psycopg.errors.DivisionByZero), connection.pipeline() as pipeline:
            connection.execute("SELECT 1/0")
            connection.execute("SELECT 1")
            pipeline.sync()
        assert connection.execute("SELECT 1").fetchone() == (1,)


def _extended(statement: str, *, most: int = 0) -> bytes:
    """Parse, Bind, Execute, without Sync."""
    return (
        frame(b"P", b"\0" + statement.encode() + b"\0\0\0")
        + frame(b"B", b"\0\0" + bytes(6))
        + frame(b"E", b"\0" + most.to_bytes(4, "big"))
    )


def test_messages_without_a_sync(shared: Daemon) -> None:
    """Flushed answers arrive before the Sync; after an error, messages up to Sync are skipped."""
    with raw(shared) as client:
        for number in range(500):
            client.socket.sendall(_extended(f"SELECT {number}") + frame(b"H"))
            kinds = [client.next() for _ in range(4)]
            assert [kind for kind, _ in kinds] == [b"1", b"2", b"D", b"C"]
            assert kinds[2][1].endswith(str(number).encode())
        client.socket.sendall(_extended("nonsense") + _extended("SELECT 1") * 100 + SYNC)
        assert [client.next()[0] for _ in range(2)] == [b"E", b"Z"]
        client.socket.sendall(_extended("SELECT 1") * 5000 + SYNC)
        assert [client.next()[0] for _ in range(20_001)] == [b"1", b"2", b"D", b"C"] * 5000 + [b"Z"]


def test_portals(shared: Daemon) -> None:
    """A client fetches from a cursor, and limits the rows of an Execute message."""
    with psycopg.connect(shared.uri) as connection, connection.cursor("portal") as cursor:
        cursor.itersize = 7
        cursor.execute("SELECT n FROM generate_series(1, 1000) n")
        assert [n for (n,) in cursor] == list(range(1, 1001))
    with raw(shared) as client:
        begin = _extended("SELECT n FROM generate_series(1, 1000) n", most=300)
        client.socket.sendall(begin + frame(b"H"))
        assert [client.next()[0] for _ in range(303)] == [b"1", b"2"] + [b"D"] * 300 + [b"s"]
        more = frame(b"E", b"\0" + (300).to_bytes(4, "big"))
        client.socket.sendall(more * 3 + SYNC)
        kinds = [client.next()[0] for _ in range(704)]
        assert kinds == ([b"D"] * 300 + [b"s"]) * 2 + [b"D"] * 100 + [b"C", b"Z"]


def test_large_objects(shared: Daemon) -> None:
    """64 MB in pieces, by SQL and by the protocol's FunctionCall message."""
    piece = bytes(range(256)) * (1 << 14)
    with psycopg.connect(shared.uri, autocommit=True) as connection:
        row = connection.execute("SELECT lo_create(0)").fetchone()
        assert row is not None
        for number in range(16):
            connection.execute("SELECT lo_put(%s, %s, %b)", [row[0], number * len(piece), piece])
        whole = connection.execute("SELECT lo_get(%s)", row, binary=True).fetchone()
        assert whole == (piece * 16,)
    with raw(shared, "test~lo") as client:
        ((made,),) = client.query("SELECT lo_from_bytea(0, '\\x0102')")
        assert made is not None
        get = (3458).to_bytes(4, "big")  # lo_get, by its oid
        argument = b"\0\1\0\1" + b"\0\1" + b"\0\0\0\4" + int(made).to_bytes(4, "big") + b"\0\1"
        client.send(b"F", get + argument)
        assert client.next() == (b"V", b"\0\0\0\2\1\2")
        assert client.next()[0] == b"Z"


def test_a_login_with_large_notices(daemon: DaemonType, tmp_path: Path) -> None:
    """Megabytes of notices during the login reach each client, even on a warm connection."""
    (tmp_path / "a.sql").write_text(
        "CREATE FUNCTION greet() RETURNS event_trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE NOTICE '%', repeat('x', 3000000); END $$;"
        "CREATE EVENT TRIGGER greet ON login EXECUTE FUNCTION greet();"
    )
    version = str(need_version(17))
    served = daemon("--pg-version", version, "--template", f"app={tmp_path / 'a.sql'}")
    for _ in range(6):
        with dial(("127.0.0.1", served.port)) as client:
            client.sendall(startup_message({"user": "postgres", "database": "app"}) + TERMINATE)
            assert read_to_the_end(client).count(b"x" * 3_000_000) == 1


# replication, in a server per lease


@contextmanager
def _replicating(uri: str) -> Iterator[pq.PGconn]:
    connection = pq.PGconn.connect(f"{uri}?replication=database".encode())
    assert connection.status == pq.ConnStatus.OK, connection.error_message
    yield connection
    connection.finish()


def test_logical_replication(daemon: DaemonType, any_version: str) -> None:
    """The client streams a slot's changes, acknowledges some, and ends the stream."""
    served = daemon(*CLUSTER, "--pg-version", any_version, "-o", "wal_level=logical")
    uri = at(served, "test~r")
    with psycopg.connect(uri, autocommit=True) as writer, _replicating(uri) as stream:
        writer.execute("CREATE TABLE t (n int PRIMARY KEY)")
        writer.execute("CREATE PUBLICATION p FOR TABLE t")
        made = stream.exec_(b"CREATE_REPLICATION_SLOT s LOGICAL pgoutput")
        assert made.status == pq.ExecStatus.TUPLES_OK, made.error_message
        begun = stream.exec_(b"START_REPLICATION SLOT s LOGICAL 0/0"
                             b" (proto_version '1', publication_names 'p')")  # fmt: skip
        assert begun.status == pq.ExecStatus.COPY_BOTH, begun.error_message
        for number in range(500):
            writer.execute("INSERT INTO t VALUES (%s)", [number])
        inserted: list[int] = []
        while len(inserted) < 500:
            size, data = stream.get_copy_data(0)
            assert size > 0, stream.error_message
            if data[:1] == b"w" and data[25:26] == b"I":  # XLogData, and in it an Insert
                inserted.append(int(bytes(data[38:])))
                stream.put_copy_data(b"r" + bytes(data[9:17]) * 3 + bytes(9))
        assert inserted == list(range(500))
        stream.put_copy_end()
        stream.flush()
        while stream.get_copy_data(0)[0] > 0:
            pass
    assert served.end()[0] == 0


def test_a_base_backup(daemon: DaemonType, programs: Installation, open_dir: Path) -> None:
    """A complete backup in a session; a second connection streams the WAL meanwhile."""
    backup = programs.bin_dir / "pg_basebackup"
    if not backup.exists():
        pytest.skip("this PostgreSQL has no pg_basebackup")
    served = daemon(*CLUSTER, "--pg-version", f"=={programs.version}")
    uri = f"postgresql://postgres@127.0.0.1:{served.port}/?options=-c%20pgtemp.session%3Db"
    with psycopg.connect(at(served, "test~b"), autocommit=True) as connection:
        connection.execute("CREATE TABLE t AS SELECT 1 AS n")
        copy = open_dir / "backup"
        done = subprocess.run(
            [backup, "-d", uri, "-D", copy, "-X", "stream", "-c", "fast"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (copy / "backup_manifest").exists() and (copy / "PG_VERSION").exists()
    assert list((copy / "pg_wal").glob("0*"))
