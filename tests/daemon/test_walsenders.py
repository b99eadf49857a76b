"""Replication connections to a shared server: they reach only the client's own database."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import psycopg
import pytest
from psycopg import pq

from pgtemp.programs.installation import Installation
from pgtemp.wire.messages import Frames, frame, startup_message
from rawclient import Client, dial, error_fields, read_to_the_end
from support import Daemon, at, one

DaemonType = type[Daemon]
SPY = {"user": "spy", "database": "app", "replication": "database"}
BACKUP = frame(b"Q", b"BASE_BACKUP (CHECKPOINT 'fast', WAL false, MANIFEST 'no')\0")
SELECT = frame(b"Q", b"SELECT 1\0")
STREAM = b"START_REPLICATION SLOT s LOGICAL 0/0 (proto_version '1', publication_names 'p')"
LOGICAL = ("--role-attributes", "NOSUPERUSER REPLICATION", "-o", "wal_level=logical")


@pytest.fixture
def replicating(daemon: DaemonType) -> Daemon:
    """A daemon whose clients may replicate and are not superusers."""
    return daemon(*LOGICAL)


def refusal(answer: bytes) -> dict[str, str]:
    """The ErrorResponse at the end of an answer that contains no copied data."""
    answers = list(Frames().feed(answer))
    assert not {kind for kind, _ in answers} & {b"H", b"W", b"d"}
    kind, payload = answers[-1]
    assert kind == b"E"
    return error_fields(payload)


def answer(served: Daemon, *pieces: bytes) -> bytes:
    """The daemon's complete answer to a client that sends this and closes its side."""
    with dial(("127.0.0.1", served.port)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            client.sendall(piece)
        client.shutdown(socket.SHUT_WR)
        return read_to_the_end(client)


def test_a_base_backup_of_a_shared_server_is_refused(replicating: Daemon) -> None:
    """It is refused at once, after a query, in pieces, with the start-up and on a warm connection.

    The error has the reason and a remedy: `--isolation cluster`. Other clients are served.
    """
    hello = startup_message(SPY)
    with psycopg.connect(at(replicating, "app", "victim"), autocommit=True) as victim:
        victim.execute("CREATE TABLE secret AS SELECT 'secret of the victim' AS s")
        for pieces in (
            [hello + BACKUP],
            [hello, BACKUP],
            [hello + SELECT + BACKUP + SELECT],
            [hello, *(BACKUP[at : at + 1] for at in range(len(BACKUP)))],
        ):
            fields = refusal(answer(replicating, *pieces))
            assert (fields["S"], fields["C"]) == ("FATAL", "0A000")
            assert fields["M"].startswith("BASE_BACKUP") and "--isolation cluster" in fields["H"]
        assert victim.execute("SELECT s FROM secret").fetchone() == ("secret of the victim",)


@pytest.mark.parametrize(
    "command",
    [
        "START_REPLICATION 0/0",
        "START_REPLICATION SLOT s PHYSICAL 0/0",
        "CREATE_REPLICATION_SLOT s PHYSICAL",
        "TIMELINE_HISTORY 1",
        "UPLOAD_MANIFEST",
        " base_backup",
    ],
)
def test_other_commands_that_read_the_whole_server_are_refused(
    replicating: Daemon, command: str
) -> None:
    address = ("127.0.0.1", replicating.port)
    with Client(address, **SPY) as client:
        assert client.query("SELECT 1") == [("1",)]
        client.ask(command)
        assert refusal(read_to_the_end(client.socket))["C"] == "0A000"
    # The slot does not exist.
    assert one(at(replicating, "app"), "SELECT count(*) FROM pg_replication_slots") == 0


@pytest.mark.parametrize("arguments", [["pg_basebackup"], ["pg_receivewal", "--no-loop"]])
def test_programs_that_copy_a_whole_server_are_refused(
    replicating: Daemon, programs: Installation, open_dir: Path, arguments: list[str]
) -> None:
    name, *options = arguments
    if not (programs.bin_dir / name).exists():
        pytest.skip(f"this PostgreSQL has no {name}")
    done = subprocess.run(
        [programs.bin_dir / name, "-d", at(replicating, "app", "spy"), "-D", open_dir, *options],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0 and "--isolation cluster" in done.stderr
    assert not list(open_dir.iterdir())


def test_logical_replication_shows_only_the_clients_own_database(
    daemon: DaemonType, any_version: str
) -> None:
    """A session of a shared server reads its slot by SQL and by replication commands.

    Neither shows rows of other databases.
    """
    served = daemon(*LOGICAL, "--pg-version", any_version)
    mine, other = at(served, "app~mine", "me"), at(served, "app~other", "victim")
    with (
        psycopg.connect(mine, autocommit=True) as writer,
        psycopg.connect(other, autocommit=True) as victim,
        psycopg.connect(mine, autocommit=True, replication="database") as walsender,
    ):
        stream = walsender.pgconn
        for connection in (writer, victim):
            connection.execute("CREATE TABLE t (s text)")
            connection.execute("CREATE PUBLICATION p FOR TABLE t")
        begun = [
            stream.exec_(statement)
            for statement in (
                b"SELECT pg_create_logical_replication_slot('by_sql', 'pgoutput')",
                b'CREATE_REPLICATION_SLOT "s" LOGICAL "pgoutput" (SNAPSHOT \'nothing\')',
                STREAM,
            )
        ]
        assert begun[-1].status == pq.ExecStatus.COPY_BOTH, [one.error_message for one in begun]
        victim.execute("INSERT INTO t VALUES ('of the victim')")
        writer.execute("INSERT INTO t VALUES ('mine')")
        changes: list[bytes] = []
        while not any(b"mine" in one for one in changes):
            size, data = stream.get_copy_data(0)
            assert size > 0, stream.error_message
            changes += [bytes(data[25:])] if data[:1] == b"w" else []
        assert not any(b"victim" in one for one in changes)
        by_sql = writer.execute(
            "SELECT data FROM pg_logical_slot_get_binary_changes('by_sql', NULL, NULL,"
            " 'proto_version', '1', 'publication_names', 'p')"
        ).fetchall()
        assert any(b"mine" in data for (data,) in by_sql)
        assert not any(b"victim" in data for (data,) in by_sql)
        stream.finish()


def test_pg_recvlogical_works_in_a_shared_server(
    replicating: Daemon, programs: Installation
) -> None:
    """It creates a slot, streams from it up to a position, and drops it."""
    program = programs.bin_dir / "pg_recvlogical"
    if not program.exists():
        pytest.skip("this PostgreSQL has no pg_recvlogical")

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [program, "-d", at(replicating, "app~mine", "me"), "--slot", "s", *arguments],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    with psycopg.connect(at(replicating, "app~mine", "me"), autocommit=True) as writer:
        writer.execute("CREATE TABLE t (s text)")
        run("--create-slot", "--plugin", "test_decoding")
        writer.execute("INSERT INTO t VALUES ('mine')")
        row = writer.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
        assert row is not None
        streamed = run("--start", "--no-loop", "--endpos", row[0], "-f", "-")
        assert "table public.t: INSERT: s[text]:'mine'" in streamed
        run("--drop-slot")
