"""Dumps and restores: a real schema, both ends of the version range, and invalid dumps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from conftest import need_version
from pgtemp import OptionError, PgTempDB, TransferError
from pgtemp.programs import search
from support import children

SCHEMA = """
CREATE SCHEMA sales; CREATE SCHEMA "Odd Name";
CREATE SEQUENCE sales.invoice START 1000 INCREMENT 7;
CREATE TYPE sales.state AS ENUM ('open', 'paid');
CREATE TABLE sales.customer (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL);
CREATE TABLE sales.bill (
    number int PRIMARY KEY DEFAULT nextval('sales.invoice'),
    customer int REFERENCES sales.customer, state sales.state DEFAULT 'open',
    amount numeric CHECK (amount > 0), changed timestamptz, note text);
CREATE TABLE "Odd Name"."weird ""table\""" (a bytea, b jsonb, c text[], d tstzrange);
CREATE FUNCTION sales.touch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN NEW.changed := '2020-01-01 00:00:00+00'; RETURN NEW; END $$;
CREATE TRIGGER touch BEFORE INSERT OR UPDATE ON sales.bill
    FOR EACH ROW EXECUTE FUNCTION sales.touch();
INSERT INTO sales.customer (name) SELECT 'customer ' || i FROM generate_series(1, 50) i;
INSERT INTO sales.bill (customer, amount, note)
    SELECT i % 50 + 1, i, E'a\\tb\\\\ "c" \\n' || i FROM generate_series(1, 500) i;
INSERT INTO "Odd Name"."weird ""table\""" VALUES
    ('\\x00ff', '{"a": [1, null]}', ARRAY['x', NULL, '"'], '[2020-01-01,)');
CREATE MATERIALIZED VIEW sales.total AS
    SELECT customer, sum(amount) AS amount FROM sales.bill GROUP BY customer;
CREATE INDEX ON sales.bill (customer); COMMENT ON TABLE sales.bill IS 'bills';
SELECT lo_from_bytea(4711, 'a large object');
"""
CHECKS = [
    "SELECT md5(string_agg(t::text, '|' ORDER BY t::text)) FROM sales.customer t",
    "SELECT md5(string_agg(t::text, '|' ORDER BY t::text)) FROM sales.bill t",
    "SELECT md5(string_agg(t::text, '|' ORDER BY t::text)) FROM sales.total t",
    """SELECT md5(string_agg(t::text, '|')) FROM "Odd Name"."weird ""table\""" t""",
    "SELECT convert_from(lo_get(4711), 'UTF8')",
    "SELECT last_value FROM sales.invoice",
    "SELECT obj_description('sales.bill'::regclass)",
]


def checksums(db: PgTempDB) -> list[object]:
    with db.connect() as connection:
        return [connection.execute(check).fetchone() for check in CHECKS]


@pytest.mark.parametrize(("made_by", "loaded_into"), [(15, 15), (15, 18), (18, 18), (16, 17)])
def test_dump_then_load_gives_equal_data(made_by: int, loaded_into: int, tmp_path: Path) -> None:
    """A dump and a load preserve every table, view, sequence and large object."""
    need_version(made_by), need_version(loaded_into)
    with PgTempDB(version=str(made_by), dbname="one") as source:
        with source.connect() as connection:
            connection.execute(SCHEMA)
        source.dump(tmp_path / "dump.sql")
        expected = checksums(source)
    assert None not in expected
    with PgTempDB(version=str(loaded_into), load=tmp_path / "dump.sql", dbname="two") as target:
        assert checksums(target) == expected
    with PgTempDB(version=str(loaded_into)) as target:
        target.load(tmp_path / "dump.sql")
        assert checksums(target) == expected
        with target.connect() as connection, pytest.raises(psycopg.errors.CheckViolation):
            connection.execute("INSERT INTO sales.bill (amount) VALUES (-1)")


@pytest.mark.parametrize("form", ["custom", "tar", "directory", "plain"])
def test_every_format_of_pg_dump(form: str, tmp_path: Path) -> None:
    """Archives are recognized by their first bytes and restored with pg_restore."""
    with PgTempDB() as source:
        with source.connect() as connection:
            connection.execute(SCHEMA)
        program = search.find(None, None).program("pg_dump")
        out = tmp_path / "dump"
        conninfo = f"host={source.socket_dir} port={source.port} user=postgres dbname=postgres"
        subprocess.run([program, "-F", form, "-f", out, "-d", conninfo], check=True)
        expected = checksums(source)
    with PgTempDB(load=out) as target:
        assert checksums(target) == expected


def test_a_dump_with_create(tmp_path: Path) -> None:
    """pg_dump --create continues in its own database; the requested one would remain empty."""
    with PgTempDB(dbname="shop") as source:
        with source.connect() as connection:
            connection.execute(SCHEMA)
        program = search.find(None, None).program("pg_dump")
        conninfo = f"host={source.socket_dir} port={source.port} user=postgres dbname=shop"
        out = tmp_path / "dump.sql"
        subprocess.run([program, "--create", "-f", out, "-d", conninfo], check=True)
    with pytest.raises(TransferError, match="continues in the database shop"):
        PgTempDB(load=out).start()


INVALID = "CREATE TABLE t (n int);\nINSERT INTO t VALUES (1);\nINSERT INTO t VALUES ('x');\n"


def test_an_invalid_dump_names_the_line_and_leaves_no_server(
    tmp_path: Path, open_dir: Path
) -> None:
    """The error has psql's message and line; the server that was to load it is removed."""
    (tmp_path / "bad.sql").write_text(INVALID)
    with pytest.raises(TransferError) as caught:
        PgTempDB(load=tmp_path / "bad.sql", data_dir_prefix=open_dir).start()
    assert "bad.sql:3" in str(caught.value)
    assert 'invalid input syntax for type integer: "x"' in str(caught.value)
    assert not [path for path in open_dir.iterdir() if not path.name.endswith(".gone")]


def test_an_invalid_dump_leaves_a_running_database_unchanged(tmp_path: Path) -> None:
    """None of the dump's statements takes effect, and earlier data stays."""
    (tmp_path / "bad.sql").write_text(INVALID)
    with PgTempDB() as db, db.connect() as connection:
        connection.execute("CREATE TABLE before ()")
        connection.commit()
        with pytest.raises(TransferError, match=r"bad\.sql:3"):
            db.load(tmp_path / "bad.sql")
        found = "SELECT to_regclass('t'), to_regclass('before') IS NOT NULL"
        assert connection.execute(found).fetchone() == (None, True)


def test_a_missing_role_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "owned.sql").write_text("CREATE TABLE t ();\nALTER TABLE t OWNER TO alice;\n")
    with pytest.raises(TransferError, match="--no-owner"):
        PgTempDB(load=tmp_path / "owned.sql").start()


def test_a_broken_archive_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.dump").write_bytes(b"PGDMP" + bytes(40))
    with pytest.raises(TransferError, match=r"broken\.dump"):
        PgTempDB(load=tmp_path / "broken.dump").start()


def test_a_dump_replaces_only_regular_files(tmp_path: Path) -> None:
    """/dev/null or a pipe stays what it is; a link stays a link."""
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    target.write_text("old")
    link.symlink_to(target)
    with pytest.raises(OptionError, match="is not a regular file"):
        PgTempDB(dump=pipe)
    with PgTempDB() as db:
        with pytest.raises(TransferError, match="is not a regular file"):
            db.dump(pipe)
        db.dump(link)
    assert pipe.is_fifo()
    assert link.is_symlink() and "PostgreSQL database dump" in target.read_text()


def test_a_dump_at_the_end(tmp_path: Path) -> None:
    """dump= writes the file when the server stops; an existing file is replaced."""
    out = tmp_path / "out.sql"
    out.write_text("old")
    with PgTempDB(dump=out) as db, db.connect() as connection:
        connection.execute("CREATE TABLE made_in_the_test ()")
    assert "made_in_the_test" in out.read_text()
    with pytest.raises(OptionError):
        PgTempDB(dump=tmp_path)


def test_a_table_that_another_session_locks(tmp_path: Path) -> None:
    """A dump does not wait for the lock; the error has PostgreSQL's message and a remedy."""
    with PgTempDB() as db, db.connect() as connection, connection.transaction():
        connection.execute("CREATE TABLE t (n int)")
        connection.execute("COMMIT; BEGIN; LOCK TABLE t")
        with pytest.raises(TransferError, match="another session locks a table; close it") as told:
            db.dump(tmp_path / "out.sql")
        assert any("LOCK TABLE public.t" in line for line in told.value.details)
    assert list(tmp_path.iterdir()) == []


def test_a_server_whose_backend_is_stopped_is_not_waited_for(tmp_path: Path) -> None:
    """A client can stop the backend of pg_dump; the dump fails, and leaves no file."""
    with PgTempDB() as db, db.connect(autocommit=True) as connection:
        connection.execute("CREATE TABLE t AS SELECT 1 AS n")
        stopper = (
            "import os, signal, sys, time\n"
            "while True:\n"
            "    for pid in filter(str.isdigit, os.listdir('/proc')):\n"
            "        try: line = open(f'/proc/{pid}/cmdline').read()\n"
            "        except OSError: continue\n"
            f"        if line.startswith('postgres: ') and '[local]' in line"
            f" and os.readlink(f'/proc/{{pid}}/cwd') == '{db.data_dir}':\n"
            "            os.kill(int(pid), signal.SIGSTOP); sys.exit()\n"
        )
        with subprocess.Popen([sys.executable, "-c", stopper]) as stopping:
            with pytest.raises(TransferError, match="are stopped"):
                db.dump(tmp_path / "out.sql")
            assert stopping.wait(30) == 0
        assert list(tmp_path.iterdir()) == []
        for pid in children(db.pid):
            os.kill(pid, signal.SIGCONT)
