"""One server, many databases: clones, templates, snapshots."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from conftest import leftovers
from pgtemp import Cluster, ClusterError, OptionError, Snapshot, Template, TransferError
from pgtemp.sql import admin_sql
from support import eventually


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One server for the tests of this module, with room for prepared transactions."""
    settings = {"max_prepared_transactions": "5", "wal_level": "logical"}
    with Cluster(config=settings) as cluster:
        yield cluster


def databases(of: Cluster | Template) -> set[str]:
    server = of.server if isinstance(of, Cluster) else of._server
    with psycopg.connect(server.info.uri) as connection:
        return {name for (name,) in connection.execute("SELECT datname FROM pg_database")}


def make_table(uri: str) -> None:
    with psycopg.connect(uri) as connection:
        connection.execute("CREATE TABLE account (id int PRIMARY KEY, balance numeric)")
        connection.execute("INSERT INTO account VALUES (1, 100)")


def test_each_version(any_version: str) -> None:
    """Databases of each version are separate, and gone with their cluster."""
    with Cluster(version=any_version, user="me") as cluster:
        data_dir = cluster.server.data_dir
        with cluster.database() as one, cluster.database() as two:
            make_table(one.uri)
            with two.connect() as connection:
                row = connection.execute("SELECT to_regclass('account'), current_user").fetchone()
                assert row == (None, "me")
        app = cluster.template("app", build=make_table)
        with app.database() as db, db.connect() as connection:
            assert connection.execute("SELECT balance FROM account").fetchone() == (100,)
    assert leftovers(data_dir) == []


def test_a_database_is_dropped_behind_the_back(cluster: Cluster) -> None:
    """Also while somebody is connected to it."""
    db = cluster.database()
    connection = db.connect()
    assert db.dbname in databases(cluster)
    db.close()
    db.close()
    assert eventually(lambda: db.dbname not in databases(cluster))
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    connection.close()


def test_what_keeps_a_database_is_undone(cluster: Cluster) -> None:
    """A prepared transaction, a replication slot and a subscription do not stop the drop."""
    db = cluster.database()
    with psycopg.connect(db.uri, autocommit=True) as connection:
        connection.execute("SELECT pg_create_logical_replication_slot('left', 'test_decoding')")
        connection.execute("CREATE TABLE t (n int)")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO t VALUES (1)")
        connection.execute("PREPARE TRANSACTION 'left behind'")
        connection.execute(
            "CREATE SUBSCRIPTION s CONNECTION 'host=127.0.0.1' PUBLICATION p"
            " WITH (connect = false, slot_name = NONE)"
        )
    db.close()
    assert eventually(lambda: db.dbname not in databases(cluster))
    with psycopg.connect(cluster.info.uri) as connection:
        left = (
            "SELECT (SELECT count(*) FROM pg_prepared_xacts),"
            " (SELECT count(*) FROM pg_subscription),"
            " (SELECT count(*) FROM pg_replication_slots)"
        )
        assert connection.execute(left).fetchone() == (0, 0, 0)


def test_a_template_is_built_once_however_many_ask(cluster: Cluster) -> None:
    built: list[str] = []

    def build(uri: str) -> None:
        built.append(uri)
        make_table(uri)

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: cluster.template("once", build=build), range(8)))
    assert len(built) == 1
    assert {template.dbname for template in made} == {made[0].dbname}


def test_a_template_is_sealed(cluster: Cluster) -> None:
    """Nobody can connect to it any more, so it stays as it was built."""
    template = cluster.template("sealed", build=make_table)
    with pytest.raises(psycopg.OperationalError, match="not currently accepting connections"):
        psycopg.connect(template._server.info.uri.removesuffix("postgres") + template.dbname)


def test_a_build_that_leaves_a_connection_open_is_sealed_all_the_same(cluster: Cluster) -> None:
    kept: list[psycopg.Connection] = []

    def build(uri: str) -> None:
        make_table(uri)
        kept.append(psycopg.connect(uri))

    with cluster.template("held", build=build).database() as db, db.connect() as connection:
        assert connection.execute("SELECT count(*) FROM account").fetchone() == (1,)
    kept[0].close()


def test_a_failed_build_leaves_nothing_and_everybody_gets_the_error(cluster: Cluster) -> None:
    """A callable's own error comes as it is; the next call tries again."""
    together = threading.Barrier(3)

    def fail(uri: str) -> None:
        make_table(uri)
        raise RuntimeError("migration 7")

    def ask(_: int) -> None:
        together.wait()
        with pytest.raises(RuntimeError, match="migration 7"):
            cluster.template("failing", build=fail)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(ask, range(3)))
    assert not [name for name in databases(cluster) if "failing" in name]
    cluster.template("failing", build=make_table)


def test_a_name_stands_for_one_build(cluster: Cluster) -> None:
    cluster.template("name", build=make_table)
    with pytest.raises(OptionError, match="already built with another recipe or parent"):
        cluster.template("name", build=lambda uri: None)


@pytest.mark.slow
def test_templates_from_files(cluster: Cluster, tmp_path: Path) -> None:
    """SQL, a directory of three hundred files in order, a dump, several in turn."""
    (tmp_path / "one.sql").write_text("CREATE TABLE steps (n int);")
    many = tmp_path / "many"
    many.mkdir()
    for i in range(300):
        (many / f"{i:03d}.sql").write_text(
            f"INSERT INTO steps SELECT {i} WHERE {i} = (SELECT count(*) FROM steps);"
        )
    template = cluster.template("files", build=[tmp_path / "one.sql", many])
    with template.database() as db, db.connect() as connection:
        assert connection.execute("SELECT count(*), max(n) FROM steps").fetchone() == (300, 299)
        db.dump(tmp_path / "dump.sql")
    from_dump = cluster.template("from a dump", build=tmp_path / "dump.sql")
    with from_dump.database() as db, db.connect() as connection:
        assert connection.execute("SELECT count(*) FROM steps").fetchone() == (300,)
    (tmp_path / "bad.sql").write_text("SELECT 1;\nSELEC;\n")
    with pytest.raises(TransferError, match=r"bad\.sql:2"):
        cluster.template("bad", build=tmp_path / "bad.sql")
    with pytest.raises(OptionError, match="does not exist"):
        cluster.template("missing", build=tmp_path / "missing.sql")


def test_a_template_may_start_from_another(cluster: Cluster) -> None:
    def more(uri: str) -> None:
        with psycopg.connect(uri) as connection:
            connection.execute("INSERT INTO account VALUES (2, 200)")

    base = cluster.template("base", build=make_table)
    with base.template("more", build=more).database() as db, db.connect() as connection:
        assert connection.execute("SELECT sum(balance) FROM account").fetchone() == (300,)
    with base.database() as db, db.connect() as connection:
        assert connection.execute("SELECT sum(balance) FROM account").fetchone() == (100,)


EVERYTHING = """
CREATE EXTENSION pg_trgm; CREATE SEQUENCE s START 40; SELECT nextval('s'), nextval('s');
SELECT lo_from_bytea(99, 'large'); COMMENT ON SEQUENCE s IS 'said';
CREATE TABLE t AS SELECT 1 AS n; GRANT SELECT ON t TO PUBLIC;
CREATE MATERIALIZED VIEW v AS SELECT n + 1 AS n FROM t;
"""


def dumped(db: object, path: Path) -> list[str]:
    db.dump(path)  # type: ignore[attr-defined]
    lines = path.read_text().splitlines()
    return [line for line in lines if "restrict" not in line]  # a random word of pg_dump's


def test_snapshot_restore_and_fork_carry_everything(cluster: Cluster, tmp_path: Path) -> None:
    """pg_dump says the same of a snapshot's restoration and of a fork as of the original."""
    with cluster.database() as db:
        with db.connect() as connection:
            connection.execute(EVERYTHING)
        expected = dumped(db, tmp_path / "original.sql")
        snapshot = db.snapshot("before")
        with db.connect() as connection:
            connection.execute("DROP TABLE t CASCADE; SELECT nextval('s')")
        with db.fork() as fork, fork.connect() as connection:
            assert connection.execute("SELECT to_regclass('t')").fetchone() == (None,)
        still = db.connect()  # a restore does not mind
        db.restore(snapshot)
        still.close()
        assert dumped(db, tmp_path / "restored.sql") == expected
        with db.fork() as fork:
            assert dumped(fork, tmp_path / "forked.sql") == expected


@pytest.mark.slow
def test_a_snapshot_of_a_database_in_use_says_who(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_sql, "IN_USE_SECONDS", 0.2)
    with cluster.database() as db, db.connect(application_name="the culprit") as connection:
        connection.execute("SELECT 'its last query'")
        with pytest.raises(ClusterError, match="the culprit: SELECT 'its last query'"):
            db.snapshot("now")


def test_options_that_are_not_for_a_cluster(tmp_path: Path) -> None:
    (tmp_path / "x.sql").write_text("")
    with pytest.raises(OptionError, match="load="):
        Cluster(load=tmp_path / "x.sql")
    with pytest.raises(ClusterError, match="not running"):
        Cluster().database()


@pytest.mark.slow
def test_many_in_a_row_leave_none(cluster: Cluster) -> None:
    """Two hundred databases, each used and closed; in the end none of them is there."""
    template = cluster.template("row", build=make_table)
    names = set()
    for _ in range(200):
        with template.database() as db, db.connect() as connection:
            connection.execute("UPDATE account SET balance = 0")
            names.add(db.dbname)
    assert len(names) == 200
    assert eventually(lambda: not names & databases(template), 30)


def test_after_stop_claims_are_refused_and_close_does_nothing() -> None:
    """Whatever the order of a test's teardown, nothing hangs and nothing raises in vain."""
    with Cluster() as cluster:
        template = cluster.template("x", build=make_table)
        db = template.database()
    with pytest.raises(ClusterError, match="not running"):
        template.database()
    with pytest.raises(ClusterError, match="not running"):
        cluster.database()
    db.close()
    cluster.stop()
    with cluster, cluster.database() as again, again.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_stop_while_many_claim() -> None:
    """Everybody gets a database or the error that says why not."""
    with Cluster() as cluster, ThreadPoolExecutor(6) as threads:
        cluster.database().close()

        def claim(_: int) -> str:
            try:
                for _ in range(50):
                    cluster.database().close()
            except ClusterError as error:
                return str(error)
            return "all of them"

        asked = [threads.submit(claim, i) for i in range(6)]
        cluster.stop()
        for one in asked:
            assert one.result(30) == "all of them" or "not running" in one.result()


def test_a_forked_child_touches_nothing(cluster: Cluster) -> None:
    """Closing and claiming in a child leave the parent's databases alone."""
    script = (
        "import os\n"
        "from pgtemp import Cluster, ClusterError\n"
        "with Cluster() as cluster:\n"
        "    db = cluster.database()\n"
        "    if os.fork() == 0:\n"
        "        db.close()\n"
        "        try: cluster.database()\n"
        "        except ClusterError: os._exit(7)\n"
        "        os._exit(8)\n"
        "    print(os.waitstatus_to_exitcode(os.wait()[1]))\n"
        "    with db.connect() as c: print(c.execute('SELECT 1').fetchone())\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert said.stdout == "7\n(1,)\n"


def test_the_same_name_from_another_template_is_another_build(cluster: Cluster) -> None:
    def same(uri: str) -> None:
        """Nothing more."""

    one = cluster.template("one base", build=make_table)
    one.template("derived", build=same)
    with pytest.raises(OptionError, match="already built with another recipe or parent"):
        cluster.template("derived", build=same)


@pytest.mark.parametrize("name", ["", "a\0b", "\udc80"])
def test_what_cannot_name_a_template(cluster: Cluster, name: str) -> None:
    with pytest.raises(OptionError, match="is not a valid template name"):
        cluster.template(name, build=make_table)


@pytest.mark.parametrize("name", ["a b", 'a"b', "100%", "ü" * 60, "a'b\n{}"])
def test_what_can_name_a_template(cluster: Cluster, name: str) -> None:
    with cluster.template(name, build=make_table).database() as db, db.connect() as connection:
        assert connection.execute("SELECT count(*) FROM account").fetchone() == (1,)


def test_a_builds_own_database_error_comes_as_it_is(cluster: Cluster) -> None:
    """Whoever waits for the same template gets that error too, from one build."""
    builds: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def fail(uri: str) -> None:
        builds.append(uri)
        begun.set()
        go_on.wait(10)
        with psycopg.connect(uri) as connection:
            connection.execute("CREATE TABEL t ()")

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cluster.template, "syntax", fail)
        begun.wait(10)
        second = threads.submit(cluster.template, "syntax", fail)
        assert eventually(second.running)
        go_on.set()
        for asked in (first, second):
            with pytest.raises(psycopg.errors.SyntaxError):
                asked.result(30)


def test_a_build_that_leaves_a_prepared_transaction(cluster: Cluster) -> None:
    """It is rolled back before the template is sealed."""

    def build(uri: str) -> None:
        with psycopg.connect(uri, autocommit=True) as connection:
            connection.execute("CREATE TABLE t (n int)")
            connection.execute("BEGIN")
            connection.execute("INSERT INTO t VALUES (1)")
            connection.execute("PREPARE TRANSACTION 'in the template'")

    with cluster.template("prepared", build=build).database() as db, db.connect() as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)


def test_snapshots_go_with_their_database(cluster: Cluster) -> None:
    db = cluster.database()
    make_table(db.uri)
    snapshot = db.snapshot("s")
    assert snapshot.dbname in databases(cluster)
    db.close()
    assert eventually(lambda: not {db.dbname, snapshot.dbname} & databases(cluster))
    for call in (db.fork, lambda: db.snapshot("t"), lambda: db.restore(snapshot)):
        with pytest.raises(ClusterError, match="is closed"):
            call()


def test_a_restore_that_cannot_be_leaves_the_database(cluster: Cluster) -> None:
    with cluster.database() as db:
        make_table(db.uri)
        with pytest.raises(ClusterError):
            db.restore(Snapshot("nowhere", "no_such_database"))
        with db.connect() as connection:
            assert connection.execute("SELECT count(*) FROM account").fetchone() == (1,)


def test_a_suite_that_terminates_everybody_else(cluster: Cluster) -> None:
    """pgtemp's own connections are replaced, and databases are dropped as ever."""
    db = cluster.database()
    make_table(db.uri)
    with psycopg.connect(cluster.info.uri) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
    db.close()
    with cluster.database() as another:
        make_table(another.uri)
    assert eventually(lambda: not {db.dbname, another.dbname} & databases(cluster))
