"""A database made of the directory of one that was dropped is what its template is."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest

from conftest import need_version
from pgtemp import Cluster, Template
from pgtemp.host import identity
from pgtemp.supervisor import recycle_files
from pgtemp.templates import recycle
from support import children, eventually

_SCHEMA = """
CREATE TABLE account (id serial PRIMARY KEY, balance numeric, about text);
INSERT INTO account (balance, about) SELECT n, repeat('x', n) FROM generate_series(1, 500) n;
CREATE INDEX by_balance ON account (balance);
CREATE TABLE empty (a int);
CREATE UNLOGGED TABLE fleeting AS SELECT n FROM generate_series(1, 10) n;
CREATE MATERIALIZED VIEW total AS SELECT sum(balance) FROM account;
"""
_WHOLE = """
SELECT (SELECT count(*) FROM account), (SELECT sum(length(about)) FROM account WHERE id > 0),
  (SELECT count(*) FROM empty), (SELECT count(*) FROM fleeting), (SELECT sum FROM total),
  (SELECT last_value FROM account_id_seq), (SELECT count(*) FROM pg_class), (SELECT count(*) FROM
  pg_attribute), (SELECT count(*) FROM pg_largeobject_metadata), (SELECT count(*) FROM pg_extension)
"""
_CHANGES = {
    "rows": ["UPDATE account SET balance = 0", "DELETE FROM account WHERE id < 100", "CHECKPOINT"],
    "growth": ["INSERT INTO account (about) SELECT repeat('y', 9000) FROM generate_series(1, 999)"],
    "files that go": ["DROP TABLE account CASCADE", "DROP TABLE empty, fleeting"],
    "files that come": ["CREATE TABLE more AS SELECT * FROM account", "CREATE INDEX ON more (id)"],
    "new files for old": ["TRUNCATE account", "REFRESH MATERIALIZED VIEW total",
                          "CLUSTER account USING by_balance", "REINDEX DATABASE {}"],
    "catalogs": ["VACUUM FULL pg_class", "VACUUM FULL pg_attribute", "REINDEX SYSTEM {}"],
    "objects": ["CREATE EXTENSION IF NOT EXISTS plpgsql", "SELECT lo_from_bytea(0, 'x')",
                "SELECT nextval('account_id_seq')", "ANALYZE", "CREATE SCHEMA mine"],
    "settings": ["ALTER DATABASE {} SET work_mem = '1MB'", "ALTER DATABASE {} CONNECTION LIMIT 3",
                 "COMMENT ON DATABASE {} IS 'mine'", "REVOKE CONNECT ON DATABASE {} FROM PUBLIC"],
}  # fmt: skip


@pytest.fixture(
    params=(15, *(pytest.param(one, marks=pytest.mark.slow) for one in (16, 17)), 18),
)
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Cluster(version=str(need_version(request.param))) as cluster:
        yield cluster


@pytest.fixture
def app(cluster: Cluster, tmp_path: Path) -> Template:
    schema = tmp_path / "schema.sql"
    schema.write_text(_SCHEMA)
    return cluster.template("app", build=schema)


def run(app: Template, dbname: str, *statements: str) -> list[tuple[object, ...]]:
    """What the last of some statements gives."""
    uri = replace(app._server.info, dbname=dbname).uri
    with psycopg.connect(uri, autocommit=True) as connection:
        for statement in statements:
            done = connection.execute(statement.format(dbname).encode())
        return done.fetchall() if done.description else []


def directory(app: Template, dbname: str) -> Path:
    """Without a connection to it, which may write there."""
    query = f"SELECT oid FROM pg_database WHERE datname = '{dbname}'"
    return app._server.data_dir / "base" / str(run(app, "postgres", query)[0][0])


def content(place: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(place.iterdir())
    }


def begin(app: Template) -> None:
    """Dispose of so many that directories are kept from now on."""
    for number in range(recycle._AFTER + 1):
        app._shared._clones.make(f"first_{number}")
        app._shared._clones.dispose(f"first_{number}")


def shelves(app: Template) -> list[Path]:
    return list((app._server.data_dir.parent / "recycled").glob("*"))


def helper(app: Template) -> int:
    """The pid of the process that looks after the shelf."""
    process = app._shared._clones._reuse._process
    assert process is not None
    return process.pid


@pytest.mark.parametrize("changes", _CHANGES.values(), ids=_CHANGES)
def test_nothing_of_what_was_done_in_it_is_left(app: Template, changes: list[str]) -> None:
    """The directory is the one of before; its bytes, and what it says, are the template's."""
    app._shared._clones.make("untouched")
    sealed = content(directory(app, "untouched"))
    whole = run(app, "untouched", _WHOLE)
    begin(app)
    app._shared._clones.make("used")
    was = directory(app, "used").stat().st_ino
    run(app, "used", *changes)
    app._shared._clones.dispose("used")
    for number in range(3):  # whatever is on the shelf
        app._shared._clones.make(f"fresh_{number}")
    found = [directory(app, f"fresh_{number}") for number in range(3)]
    assert was in [place.stat().st_ino for place in found]
    for number, place in enumerate(found):
        assert content(place) == sealed
        assert run(app, f"fresh_{number}", _WHOLE) == whole
    settings = "SELECT count(*) FROM pg_db_role_setting"
    assert run(app, "fresh_0", settings) == run(app, "untouched", settings)


def test_files_that_somebody_puts_there_are_taken_away(app: Template) -> None:
    """Links, pipes, directories and files of others; what they led to stays as it is."""
    begin(app)
    app._shared._clones.make("used")
    place, owner = directory(app, "used"), identity.choose(None)
    run(app, "used", "CHECKPOINT")
    sealed = content(place)
    victim = place.parent.parent / "victim"
    victim.write_text("mine")
    os.chown(victim, owner.uid, owner.gid)
    names = sorted(sealed)
    for name, make in (
        (names[3], lambda path: path.symlink_to(victim)),
        (names[4], lambda path: path.mkdir()),
        (names[5], lambda path: path.write_bytes(b"x" * 8192)),
        ("extra", lambda path: path.symlink_to(place.parent)),
        ("pipe", os.mkfifo),
        ("deep", lambda path: (path / "er").mkdir(parents=True)),
    ):
        (place / name).unlink(missing_ok=True)
        make(place / name)
        for path in (place / name, *(place / name).glob("*")):
            if not path.is_symlink():
                os.chown(path, owner.uid, owner.gid)
    app._shared._clones.dispose("used")
    app._shared._clones.make("a")
    app._shared._clones.make("b")
    assert content(directory(app, "a")) == content(directory(app, "b")) == sealed
    assert victim.read_text() == "mine"


def test_it_works_as_the_servers_user(app: Template) -> None:
    """Not as root: whoever is a superuser in the server may put links where it works."""
    begin(app)
    status = dict(
        line.split(":\t") for line in Path(f"/proc/{helper(app)}/status").read_text().splitlines()
        if ":\t" in line
    )  # fmt: skip
    owner = str(app._server.data_dir.stat().st_uid)
    assert status["Uid"].split() == [owner] * 4
    assert status["Groups"].split() in ([], [str(one) for one in os.getgroups()])


def test_it_ends_with_the_cluster(cluster: Cluster, app: Template) -> None:
    begin(app)
    pid, home = helper(app), app._server.data_dir.parent
    cluster.stop()
    assert eventually(lambda: not Path(f"/proc/{pid}").exists())
    assert eventually(lambda: not home.exists())


def test_where_it_cannot_begin_nothing_of_it_is_left(app: Template) -> None:
    """A file is in the place of the shelf's directory."""
    home = app._server.data_dir.parent
    (home / "recycled").rmdir()
    (home / "recycled").write_text("")
    begin(app)
    assert not app._shared._clones._reuse.works
    assert run(app, "postgres", "SELECT datname FROM pg_database WHERE datname ~ '^stub'") == []
    assert eventually(lambda: not Path(f"/proc/{helper(app)}").exists())
    app._shared._clones.make("after")
    assert run(app, "after", "SELECT count(*) FROM account") == [(500,)]


def test_databases_are_had_when_it_was_killed(app: Template) -> None:
    begin(app)
    pid = helper(app)
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: pid not in children(os.getpid()))
    for number in range(3):
        app._shared._clones.make(f"later_{number}")
        assert run(app, f"later_{number}", "SELECT count(*) FROM account") == [(500,)]
        app._shared._clones.dispose(f"later_{number}")


def test_what_was_made_of_one_outlives_a_crash(app: Template) -> None:
    """Recovery brings back what was committed in it, and does not copy the stub over it."""
    begin(app)
    app._shared._clones.make("used")
    place = directory(app, "used")
    synchronous = "SET synchronous_commit = on"
    run(app, "used", synchronous, "UPDATE account SET balance = 7", "CREATE TABLE more (a int)")
    with psycopg.connect(replace(app._server.info, dbname="used").uri) as connection:
        os.kill(connection.info.backend_pid, signal.SIGKILL)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT pg_sleep(60)")

    def recovered() -> bool:
        try:
            return run(app, "used", "SELECT count(*) FROM more") == [(0,)]
        except psycopg.OperationalError:
            return False

    assert eventually(recovered)
    assert directory(app, "used") == place
    assert run(app, "used", "SELECT DISTINCT balance FROM account") == [(7,)]
    app._shared._clones.dispose("used")
    for number in range(2):
        app._shared._clones.make(f"later_{number}")
        assert run(app, f"later_{number}", "SELECT sum(balance) FROM account") == [(125250,)]


def test_who_is_in_it_is_ended(app: Template) -> None:
    begin(app)
    app._shared._clones.make("used")
    uri = replace(app._server.info, dbname="used").uri
    with psycopg.connect(uri) as stays:
        stays.execute("SELECT 1")
        app._shared._clones.dispose("used")
        with pytest.raises(psycopg.OperationalError):
            stays.execute("SELECT 1")
    names = {row[0] for row in run(app, "postgres", "SELECT datname FROM pg_database")}
    assert "used" not in names
    assert not any(name.startswith("gone") for name in names)


def test_a_tablespace_is_left_alone(app: Template) -> None:
    """The files of a template may be in several places then."""
    place = app._server.data_dir.parent / "elsewhere"
    place.mkdir()
    owner = identity.choose(None)
    os.chown(place, owner.uid, owner.gid)
    run(app, "postgres", f"CREATE TABLESPACE elsewhere LOCATION '{place}'")
    begin(app)
    assert shelves(app) == []
    app._shared._clones.make("later")
    assert run(app, "later", "SELECT count(*) FROM account") == [(500,)]


def test_a_standby_gets_all_the_files(app: Template) -> None:
    """It replays the server's log, in which what is put there by hand does not stand."""
    begin(app)
    run(app, "postgres", "SELECT pg_create_physical_replication_slot('standby', true)")
    app._shared._clones.make("later")
    assert shelves(app) == []
    assert run(app, "later", "SELECT count(*) FROM account") == [(500,)]
    run(app, "postgres", "SELECT pg_drop_replication_slot('standby')")


def test_kept_data_has_nothing_of_it(app: Template) -> None:
    begin(app)
    assert len(shelves(app)) == 1
    app._shared._clones.settle()
    assert shelves(app) == []
    rows = run(app, "postgres", "SELECT datname FROM pg_database WHERE datname LIKE 'stub%'")
    assert rows == []
    app._shared._clones.make("later")
    assert run(app, "later", "SELECT count(*) FROM account") == [(500,)]


def shelf_with(directory: Path, *extra: str) -> recycle_files.Recycler:
    """A shelf of a template of three files, and on it a dropped database with more files."""
    base = directory / "data" / "base"
    for oid in ("1", "2"):
        (base / oid).mkdir(parents=True)
        for name in ("PG_VERSION", "1247", "1249"):
            (base / oid / name).write_text(name)
    (directory / "recycled").mkdir()
    shelf = recycle_files.Recycler(str(directory))
    shelf.begin("1")
    for name in extra:
        (base / "2" / name).parent.mkdir(exist_ok=True)
        (base / "2" / name).touch()
    shelf.take("2")
    shelf.restore("2")
    return shelf


MANY = [f"{number}" for number in range(5000, 7000)]


def test_a_directory_with_far_too_many_files(tmp_path: Path) -> None:
    """It is not used again, and removed in portions while no client waits."""
    shelf = shelf_with(tmp_path, *MANY)
    with pytest.raises(FileNotFoundError):
        shelf.put("1")
    assert len(os.listdir(tmp_path / "recycled" / "1" / "2")) > 500
    assert portions(shelf) > 5
    assert os.listdir(tmp_path / "recycled" / "1") == ["original"]


def test_a_directory_in_a_directory_with_many_files(tmp_path: Path) -> None:
    """It is moved away at once, and removed in portions while no client waits."""
    shelf = shelf_with(tmp_path, *(f"deep/{name}" for name in MANY))
    shelf.put("1")
    assert sorted(os.listdir(tmp_path / "data" / "base" / "1")) == ["1247", "1249", "PG_VERSION"]
    (moved,) = (tmp_path / "recycled" / "1").glob("*.gone")
    assert len(os.listdir(moved)) == len(MANY)
    assert portions(shelf) > 5
    assert os.listdir(tmp_path / "recycled" / "1") == ["original"]


def portions(shelf: recycle_files.Recycler) -> int:
    """In how many portions it does all that is to be done."""
    count = 0
    while shelf.has_work:
        shelf.work()
        count += 1
    return count


def test_a_process_that_does_not_answer_is_given_up(
    app: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wait, of two seconds at most; databases are made in the usual way from then on."""
    begin(app)
    app._shared._clones.make("another")
    app._shared._clones.make("used")
    app._shared._clones.dispose("another")  # so that one is on the shelf
    reuse, ours = app._shared._clones._reuse, socket.socketpair()
    assert reuse._channel is not None
    reuse._channel.close()
    reuse._channel = ours[0]  # nobody reads the other end
    now, waits = [0.0], []

    def monotonic() -> float:
        waits.append(now[0])
        now[0] += recycle._LOOK_SECONDS
        return now[0]

    monkeypatch.setattr(recycle, "time", SimpleNamespace(monotonic=monotonic))
    app._shared._clones.dispose("used")
    assert now[0] <= 3.5
    assert not reuse.works
    told = len(waits)
    app._shared._clones.make("later")
    app._shared._clones.dispose("later")
    assert len(waits) == told
    ours[1].close()


def test_a_forged_modification_time(app: Template) -> None:
    """A program can set a file's modification time to that of restored files, not its ctime."""
    begin(app)
    for number in range(3):  # directories that were restored before
        app._shared._clones.make(f"again_{number}")
        app._shared._clones.dispose(f"again_{number}")
    app._shared._clones.make("forged")
    place = directory(app, "forged")
    run(app, "forged", "UPDATE account SET balance = 666 WHERE id = 1", "CHECKPOINT")
    for path in place.iterdir():
        os.utime(path, ns=(recycle_files._MARK, recycle_files._MARK))
    app._shared._clones.dispose("forged")
    for number in range(6):
        app._shared._clones.make(f"next_{number}")
        forged = "SELECT count(*) FROM account WHERE balance = 666"
        assert run(app, f"next_{number}", forged) == [(0,)]
