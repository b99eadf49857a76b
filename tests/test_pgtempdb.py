"""`PgTempDB`, with real servers of each version."""

from __future__ import annotations

import os
from pathlib import Path

import psycopg
import pytest

from conftest import leftovers
from pgtemp import ClusterError, OptionError, PgTempDB, TransferError
from pgtemp.host import ports
from pgtemp.supervisor.crash import postgres_in
from support import eventually, homes


def test_each_version_starts_and_leaves_nothing(any_version: str) -> None:
    """A server of the requested version, available by its URL and removed afterwards."""
    with PgTempDB(version=any_version) as db:
        with psycopg.connect(db.uri) as connection:
            row = connection.execute("SHOW server_version_num").fetchone()
            assert row is not None and row[0].startswith(any_version)
            row = connection.execute("SHOW server_encoding").fetchone()
            assert row == ("UTF8",)
        data_dir, run_dir = db.data_dir, db.data_dir.parent
        assert data_dir.stat().st_mode & 0o777 == 0o700
    assert not run_dir.exists()
    assert leftovers(data_dir) == []


def test_the_options_of_the_readme(tmp_path: Path) -> None:
    """All parts of a URL and all given settings reach the server."""
    port = ports.free_port("127.0.0.1")
    db = PgTempDB.from_uri(
        f"postgresql://me:se%20cret@localhost:{port}/testdb1",
        config={"max_connections": "777"},
        initdb_args={"encoding": "LATIN1", "locale": "C"},
    )
    with db, db.connect() as connection:
        assert (db.host, db.port, db.user, db.password) == ("localhost", port, "me", "se cret")
        row = connection.execute(
            "SELECT current_user, current_database(), current_setting('max_connections'),"
            " current_setting('server_encoding')"
        ).fetchone()
        assert row == ("me", "testdb1", "777", "LATIN1")


def test_tcp_requires_the_password() -> None:
    """A wrong password is refused over TCP; the socket's directory is closed to other users."""
    with PgTempDB() as db:
        assert db.password is not None
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(db.uri.replace(db.password, "wrong"))
        # As root, the group of the server user may enter the directory, but not connect.
        assert db.socket_dir.stat().st_mode & 0o007 == 0
        assert (db.socket_dir / f".s.PGSQL.{db.port}").stat().st_mode & 0o077 == 0
        assert db.password not in repr(db)
        for pid in postgres_in(str(db.data_dir)):
            assert db.password.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert db.password not in db.log_path.read_text()


def test_a_chosen_password_is_not_logged() -> None:
    """This holds even if the server logs every statement."""
    with PgTempDB(password="grüße!", config={"log_statement": "all"}) as db:
        with db.connect() as connection:
            connection.execute("SELECT 1")
        assert "ALTER ROLE" in db.log_path.read_text()
        assert "grüße" not in db.log_path.read_text()


def test_a_server_without_tcp_has_only_the_socket() -> None:
    with PgTempDB(tcp=False, dbname="only socket") as db, db.connect() as connection:
        assert db.host == str(db.socket_dir)
        assert db.password is None
        assert connection.execute("SHOW listen_addresses").fetchone() == ("",)


def test_a_used_port_is_an_error_with_its_holder() -> None:
    """The error names the process that uses the port, and nothing is created."""
    with PgTempDB() as db:
        with pytest.raises(OptionError) as caught:
            PgTempDB(port=db.port).start()
        assert f"port {db.port}" in str(caught.value)
        if os.geteuid() == 0:
            assert f"pid {db.pid} (postgres)" in str(caught.value)


def test_an_invalid_setting_gives_the_servers_message(open_dir: Path) -> None:
    """The error has the server's own message, and nothing is left."""
    with pytest.raises(ClusterError) as caught:
        PgTempDB(config={"max_connections": "lots"}, data_dir_prefix=open_dir).start()
    assert "max_connections" in str(caught.value)
    assert eventually(lambda: list(open_dir.iterdir()) == [])


def test_files_for_settings_and_access(tmp_path: Path) -> None:
    """postgresql_conf applies, config takes precedence, and pg_hba_conf controls access."""
    conf, hba = tmp_path / "my.conf", tmp_path / "hba.conf"
    conf.write_text("work_mem = '7MB'\nmaintenance_work_mem = '17MB'\n")
    hba.write_text("host all all 127.0.0.1/32 reject\n")
    with PgTempDB(postgresql_conf=conf, pg_hba_conf=hba, config={"work_mem": "9MB"}) as db:
        with pytest.raises(psycopg.OperationalError, match="conf rejects"):
            db.connect()
        with psycopg.connect(host=str(db.socket_dir), port=db.port, user="postgres") as own:
            assert own.execute("SHOW work_mem").fetchone() == ("9MB",)
            assert own.execute("SHOW maintenance_work_mem").fetchone() == ("17MB",)


def test_copy_from_starts_from_persisted_data(open_dir: Path) -> None:
    """Persisted data was shut down cleanly, and another server can start from a copy of it."""
    with PgTempDB(persist=True, data_dir_prefix=open_dir, dbname="kept") as db:
        with db.connect() as connection:
            connection.execute("CREATE TABLE t AS SELECT 42 AS answer")
        log = db.log_path
    assert "database system is shut down" in log.read_text()
    persisted = db.data_dir
    assert (persisted / "PG_VERSION").exists()
    before = sorted((path, path.stat().st_mtime_ns) for path in persisted.rglob("*"))
    with PgTempDB(copy_from=persisted, dbname="kept") as again, again.connect() as connection:
        assert connection.execute("SELECT answer FROM t").fetchone() == (42,)
    assert sorted((path, path.stat().st_mtime_ns) for path in persisted.rglob("*")) == before


def test_persisted_data_is_never_on_tmpfs() -> None:
    with pytest.raises(OptionError, match="tmpfs"):
        PgTempDB(persist=True, data_dir_prefix="/dev/shm").start()


def test_ttl_stops_the_server_of_a_running_owner() -> None:
    """After this time the server and its directory are removed, and the handle raises errors."""
    db = PgTempDB(ttl=0.5).start()
    data_dir = db.data_dir
    assert eventually(lambda: leftovers(data_dir) == [])
    with pytest.raises(psycopg.OperationalError):
        db.connect()
    db.stop()


def test_the_log_path_of_a_user_stays(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with PgTempDB(log_path=log) as db:
        assert db.log_path == log
    assert "ready to accept connections" in log.read_text()


def test_start_and_stop_without_with() -> None:
    """Both may be called again; a handle that is not running raises an error."""
    db = PgTempDB()
    with pytest.raises(ClusterError, match="not running"):
        _ = db.uri
    assert db.start() is db
    first = db.data_dir
    assert db.start().data_dir == first
    db.stop()
    db.stop()
    assert leftovers(first) == []
    db.start()
    assert db.data_dir != first
    db.stop()


def test_a_handle_that_is_garbage_collected_stops_its_server() -> None:
    db = PgTempDB().start()
    data_dir = db.data_dir
    del db
    assert eventually(lambda: leftovers(data_dir) == [])


def test_a_long_prefix_gets_a_short_path_to_its_socket(open_dir: Path) -> None:
    """A path that is too long for a socket works through a short link, which is removed later."""
    deep = open_dir / ("d" * 100)
    deep.mkdir()
    before = homes()
    with PgTempDB(data_dir_prefix=deep, tcp=False) as db, db.connect() as connection:
        assert len(os.fsencode(db.socket_dir)) < 80
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert eventually(lambda: homes() <= before and list(deep.iterdir()) == [])


def test_libpqs_environment_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables for other servers do not affect pgtemp's own connections."""
    monkeypatch.setenv("PGHOSTADDR", "127.0.0.9")
    monkeypatch.setenv("PGOPTIONS", "-c default_transaction_read_only=on")
    monkeypatch.setenv("PGSSLMODE", "require")
    with PgTempDB(dbname="app", user="me") as db:
        for name in ("PGHOSTADDR", "PGOPTIONS", "PGSSLMODE"):
            monkeypatch.delenv(name)
        with db.connect() as connection:
            assert connection.execute("SELECT current_user").fetchone() == ("me",)


def test_a_ttl_of_months_does_not_break_the_supervisor() -> None:
    """The supervisor waits in parts for a time that is longer than poll() can wait."""
    with PgTempDB(ttl=90 * 86400) as db, db.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_link_planted_by_the_server_is_not_followed(open_dir: Path, tmp_path: Path) -> None:
    """A link that the server user creates in the run directory does not redirect a write."""
    victim = tmp_path / "victim"
    with PgTempDB(persist=True, data_dir_prefix=open_dir) as db:
        (db.data_dir.parent / "pgtemp.json").symlink_to(victim)
    assert not victim.exists()
    assert (db.data_dir.parent / "pgtemp.json").is_file()


def test_a_failed_dump_at_the_end_is_an_error_and_the_server_stops(tmp_path: Path) -> None:
    db = PgTempDB(dump=tmp_path / "out.sql", dbname="app").start()
    data_dir = db.data_dir
    with psycopg.connect(db.uri.replace("/app", "/postgres"), autocommit=True) as connection:
        connection.execute("DROP DATABASE app WITH (FORCE)")
    with pytest.raises(TransferError, match="app"):
        db.stop()
    assert not (tmp_path / "out.sql").exists()
    assert leftovers(data_dir) == []


@pytest.mark.parametrize("option", ["data-checksums", "data-check"])
def test_with_page_checksums(any_version: str, option: str) -> None:
    """With page checksums, pgtemp sets the password by SQL, for each spelling of the option."""
    with PgTempDB(version=any_version, initdb_args={option: ""}) as db, db.connect() as connection:
        assert connection.execute("SHOW data_checksums").fetchone() == ("on",)
