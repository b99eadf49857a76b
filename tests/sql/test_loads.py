"""A load ends in the named database, or its error has the line and the remedy."""

from __future__ import annotations

import gzip
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgtemp import Cluster, Database, PgTempDB, TransferError
from pgtemp.programs.installation import Installation
from pgtemp.sql.connection import conninfo
from support import run_pgtemp


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def db(cluster: Cluster) -> Iterator[Database]:
    with cluster.database() as db:
        yield db


def count(db: Database | PgTempDB, table: str) -> int:
    with db.connect() as connection:
        row = connection.execute(f"SELECT count(*) FROM {table}".encode()).fetchone()
    assert row is not None
    return int(row[0])


OTHER_DATABASES = {
    "created and connected": (
        "CREATE DATABASE shop;\n\\connect shop\nCREATE TABLE item (id int);\n", 2),
    "short command": ("SELECT 1;\n\n\\c shop\nCREATE TABLE item (id int);\n", 3),
    "quoted name": ('\\connect "my shop"\nCREATE TABLE item (id int);\n', 1),
    "as pg_dumpall": ("CREATE ROLE x;\n\\connect template1\nCREATE TABLE item (id int);\n", 2),
    "there and back": ("\\connect template1\nCREATE TABLE item ();\n\\connect app\n", 1),
}  # fmt: skip


@pytest.mark.parametrize("text, line", OTHER_DATABASES.values(), ids=OTHER_DATABASES)
def test_a_file_that_continues_in_another_database(
    db: Database, tmp_path: Path, text: str, line: int
) -> None:
    """Each way to load it fails, names the line, and leaves no table in another database."""
    path = tmp_path / "dump.sql"
    path.write_text(text)
    expected = rf"dump\.sql:{line} continues in the database .*--create"
    with pytest.raises(TransferError, match=expected):
        db.load(path)
    with pytest.raises(TransferError, match=expected):
        PgTempDB(load=path).start()
    with Cluster() as cluster, pytest.raises(TransferError, match=expected):
        cluster.template("app", build=path)
    with db.connect(dbname="template1") as connection:
        assert connection.execute("SELECT to_regclass('item')").fetchone() == (None,)


def test_the_daemon_refuses_such_a_file(tmp_path: Path) -> None:
    path = tmp_path / "dump.sql"
    path.write_text(OTHER_DATABASES["created and connected"][0])
    done = run_pgtemp("--load-from", str(path), "postgresql://localhost:29391/app")
    assert done.returncode == 2 and "dump.sql:2 continues in" in done.stderr


def test_a_file_that_connects_to_the_same_database(tmp_path: Path) -> None:
    path = tmp_path / "dump.sql"
    path.write_text("\\connect app\nCREATE TABLE item (id int);\n\\connect -\n")
    with PgTempDB(dbname="app", load=path) as db:
        assert count(db, "item") == 0


def test_an_included_file_that_connects_elsewhere(db: Database, tmp_path: Path) -> None:
    """The result shows it."""
    (tmp_path / "inner.sql").write_text("\\c template1\n")
    path = tmp_path / "outer.sql"
    path.write_text("\\ir inner.sql\n")
    with pytest.raises(TransferError, match="it ends in the database 'template1'"):
        db.load(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_a_file_in_utf_16(db: Database, tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "dump.sql"
    path.write_bytes("\ufeffCREATE TABLE item ();".encode(encoding))
    with pytest.raises(TransferError, match="UTF-16; save it as UTF-8"):
        db.load(path)


def test_a_byte_order_mark_of_utf_8(db: Database, tmp_path: Path) -> None:
    path = tmp_path / "dump.sql"
    path.write_bytes("\ufeffCREATE TABLE item AS SELECT 'é' AS name;".encode())
    db.load(path)
    assert count(db, "item WHERE name = 'é'") == 1


def test_files_are_utf_8_in_a_database_of_another_encoding(tmp_path: Path) -> None:
    """The server's encoding and PGCLIENTENCODING do not change how a file is read."""
    path = tmp_path / "dump.sql"
    path.write_text("CREATE TABLE item AS SELECT 'é' AS name;")
    latin = {"encoding": "LATIN1", "locale": "C"}
    with PgTempDB(initdb_args=latin, load=path) as db:
        assert count(db, "item WHERE octet_length(name) = 1 AND ascii(name) = 233") == 1


def test_a_file_that_names_its_encoding(db: Database, tmp_path: Path) -> None:
    path = tmp_path / "dump.sql"
    text = "SET client_encoding = 'LATIN1'; CREATE TABLE item AS SELECT 'é' AS name;"
    path.write_bytes(text.encode("latin-1"))
    db.load(path)
    assert count(db, "item WHERE name = 'é'") == 1


@pytest.mark.parametrize("archive", [False, True], ids=["plain", "custom"])
def test_a_compressed_dump(
    cluster: Cluster, db: Database, tmp_path: Path, programs: Installation, archive: bool
) -> None:
    """SQL and archives are read from gzip; a truncated file is an error."""
    with db.connect() as connection:
        connection.execute("CREATE TABLE item AS SELECT 1 AS n")
    kind = ["-Fc"] if archive else []
    server = db.server
    to = conninfo(db._private())
    command = [server.installation.program("pg_dump"), *kind, "-d", to]
    dumped = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    path = tmp_path / "dump.sql.gz"
    path.write_bytes(gzip.compress(dumped))
    with cluster.database() as other:
        other.load(path)
        assert count(other, "item") == 1
    with cluster.template(f"compressed {archive}", build=path).database() as clone:
        assert count(clone, "item") == 1
    path.write_bytes(gzip.compress(dumped)[:-20])
    with cluster.database() as other, pytest.raises(TransferError, match="cannot be decompressed"):
        other.load(path)


def test_an_error_in_a_compressed_file_names_it(db: Database, tmp_path: Path) -> None:
    path = tmp_path / "bad.sql.gz"
    path.write_bytes(gzip.compress(b"SELECT 1;\nSELEC 2;\n"))
    with pytest.raises(TransferError, match=r"bad\.sql\.gz:2: ERROR"):
        db.load(path)


FAULTS = {
    "clean": ("DROP TABLE public.item;\n", "--if-exists"),
    "clean, a constraint": ("ALTER TABLE ONLY public.item DROP CONSTRAINT c;\n", "--if-exists"),
    "a role": ("CREATE TABLE t (); ALTER TABLE t OWNER TO nobody_else;\n", "add CREATE ROLE"),
    "an extension": ("CREATE EXTENSION vector_of_tests;\n", "vector-of-tests"),
    "an extension with a schema": (
        'CREATE EXTENSION IF NOT EXISTS "no-such" WITH SCHEMA public;\n', "apt-get install"),
}  # fmt: skip


@pytest.mark.parametrize("text, remedy", FAULTS.values(), ids=FAULTS)
def test_remedies(db: Database, tmp_path: Path, text: str, remedy: str) -> None:
    path = tmp_path / "dump.sql"
    path.write_text("SELECT 1;\n" + text)
    with pytest.raises(TransferError, match=remedy) as caught:
        db.load(path)
    assert "dump.sql:2:" in str(caught.value)


def test_an_archive_whose_role_is_missing(db: Database, tmp_path: Path) -> None:
    """The remedy fits the format: SQL cannot be put at the start of an archive."""
    with PgTempDB() as other:
        with other.connect() as connection:
            connection.execute("CREATE ROLE reader; CREATE TABLE t ()")
            connection.execute("GRANT SELECT ON t TO reader")
        to = conninfo(other._private(other._running_postmaster()))
        program = other.installation.program("pg_dump")
        dumped = subprocess.run([program, "-Fc", "-d", to], check=True, stdout=subprocess.PIPE)
    path = tmp_path / "dump"
    path.write_bytes(dumped.stdout)
    with pytest.raises(TransferError, match="create its roles first") as caught:
        db.load(path)
    assert "add CREATE ROLE" not in str(caught.value)
