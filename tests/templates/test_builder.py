"""Templates that are kept on disk: built once on this machine, found again, layered."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from conftest import leftovers
from pgtemp import Cluster, ClusterError, OptionError, PgTempDB, TransferError
from support import Daemon, children, eventually, homes


@pytest.fixture(autouse=True)
def own_cache(open_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, so that nothing is found there that another test built."""
    shared = Path(os.environ["PGTEMP_CACHE_DIR"]) / "images"
    cache = open_dir / "cache"
    (cache / "images").mkdir(parents=True)
    for path in shared.glob("*"):  # initdb need not run again
        if "template" not in path.name and path.suffix != ".lock":
            shutil.copytree(path, cache / "images" / path.name, copy_function=os.link)
    monkeypatch.setenv("PGTEMP_CACHE_DIR", str(cache))
    return cache


def kept(cache: Path) -> int:
    return len(list(cache.glob("images/*template*/manifest.json")))


def built(uri: str) -> None:
    """Tables, a role and a sequence's state."""
    with psycopg.connect(uri) as connection:
        connection.execute("CREATE TABLE account (id serial PRIMARY KEY, owner text)")
        connection.execute("INSERT INTO account (owner) SELECT 'x' FROM generate_series(1, 100)")
        connection.execute(f"CREATE ROLE reader_{os.getpid()}")
        connection.execute(f"GRANT SELECT ON account TO reader_{os.getpid()}")


def test_a_kept_template_is_not_built_again(own_cache: Path, any_version: str) -> None:
    """Its rows, its sequence, and the roles that it made are all there, in each version."""
    for attempt in range(2):
        calls: list[str] = []

        def build(uri: str, calls: list[str] = calls) -> None:
            calls.append(uri)
            built(uri)

        with Cluster(version=any_version) as cluster:
            app = cluster.template("app", build, key="1")
            assert len(calls) == (1 if attempt == 0 else 0)
            with app.database() as db, db.connect() as connection:
                row = connection.execute(
                    "SELECT count(*), nextval('account_id_seq'),"
                    f" has_table_privilege('reader_{os.getpid()}', 'account', 'SELECT')"
                    " FROM account"
                ).fetchone()
                assert row == (100, 101, True)
            assert cluster.server.pid == app._server.pid  # one server is enough
    assert kept(own_cache) == 1


def test_layers_are_kept_each(own_cache: Path, tmp_path: Path) -> None:
    """A change of the upper one builds it alone."""
    lower, upper = tmp_path / "lower.sql", tmp_path / "upper.sql"
    lower.write_text("CREATE TABLE lower (n int)")
    for number in (1, 2):
        upper.write_text(f"CREATE TABLE upper_{number} (n int)")
        with Cluster() as cluster:
            both = cluster.template("lower", lower).template("upper", upper)
            with both.database() as db, db.connect() as connection:
                connection.execute(f"SELECT * FROM lower, upper_{number}")
            # What cannot be kept is built upon what can, in the server that has it.
            with (
                both.template("top", lambda uri: None).database() as db,
                db.connect() as connection,
            ):
                connection.execute(f"SELECT * FROM lower, upper_{number}")
    assert kept(own_cache) == 3


def test_a_command_builds_from_any_language(own_cache: Path, tmp_path: Path) -> None:
    """It gets DATABASE_URL and libpq's variables, with a password, over TCP."""
    script = tmp_path / "migrate.py"
    script.write_text(
        "import os, psycopg\n"
        "uri = os.environ['DATABASE_URL']\n"
        "assert '127.0.0.1' in uri and os.environ['PGPASSWORD'] in uri\n"
        "with psycopg.connect(uri) as c: c.execute('CREATE TABLE made AS SELECT current_catalog')\n"
    )
    command = f"cmd:{sys.executable} {script}"
    for _ in range(2):
        with (
            Cluster() as cluster,
            cluster.template("app", command, watch=[script]).database() as db,
            db.connect() as connection,
        ):
            assert connection.execute("SELECT * FROM made").fetchone() == ("app",)
    assert kept(own_cache) == 1


def test_a_command_that_fails_says_why_and_leaves_nothing(own_cache: Path) -> None:
    before = homes()
    with Cluster() as cluster:
        for given in ({}, {"key": "1"}):
            with pytest.raises(TransferError, match="failed with status 3") as failed:
                cluster.template("app", "cmd:echo no such column; exit 3", **given)
            assert failed.value.details == ("no such column",)
    assert kept(own_cache) == 0
    assert eventually(lambda: homes() <= before)


def test_a_data_directory_that_was_kept_is_a_template(own_cache: Path, open_dir: Path) -> None:
    """Both isolated from it: the directory itself is never touched."""
    with PgTempDB(persist=True, dbname="old", data_dir_prefix=open_dir) as db:
        built(db.uri)
    with Cluster() as cluster:
        app = cluster.template("app", db.data_dir.parent)
        with app.database() as copy, copy.connect() as connection:
            assert connection.execute("SELECT count(*) FROM account").fetchone() == (100,)
        with pytest.raises(OptionError, match="cannot start from 'app'"):
            app.template("more", db.data_dir)


def test_extensions_are_in_every_database() -> None:
    for _ in range(2):
        with Cluster(extensions=["pg_trgm", "hstore"]) as cluster:
            app = cluster.template("app", lambda uri: None)
            for made in (cluster, app):
                with made.database() as db, db.connect() as connection:
                    connection.execute("SELECT similarity('a', 'b'), 'a=>1'::hstore")
    with PgTempDB(extensions=["citext"]) as db, db.connect() as connection:
        assert connection.execute("SELECT 'A'::citext = 'a'").fetchone() == (True,)


def test_a_missing_extension_names_what_there_is_and_the_package() -> None:
    with pytest.raises(OptionError, match="postgresql-15-pgvector") as missing:
        PgTempDB(extensions=["vector"], version="15").start()
    assert "pg_trgm" in str(missing.value)
    with (
        pytest.raises(OptionError, match="did you mean pg_trgm"),
        Cluster(extensions=["pg_trmg"]) as cluster,
    ):
        cluster.database()


def test_all_extensions_are_those_that_can_be_created() -> None:
    with PgTempDB(extensions=["all"]) as db, db.connect() as connection:
        row = connection.execute("SELECT count(*) FROM pg_extension").fetchone()
        assert row is not None
        assert row[0] > 20


def test_one_process_builds_and_one_that_is_killed_frees_the_others(
    own_cache: Path, tmp_path: Path
) -> None:
    """Of four processes that need a template, the builder is killed; another builds it, once."""
    script = (
        "import sys, time, psycopg, pathlib\n"
        "from pgtemp import Cluster\n"
        "log = pathlib.Path(sys.argv[1])\n"
        "def build(uri):\n"
        "    with log.open('a') as file: file.write('built\\n')\n"
        "    if sys.argv[2] == 'slow': time.sleep(600)\n"
        "    with psycopg.connect(uri) as c: c.execute('CREATE TABLE t (n int)')\n"
        "with Cluster() as cluster:\n"
        "    with cluster.template('app', build, key='1').database() as db, db.connect() as c:\n"
        "        c.execute('SELECT * FROM t')\n"
    )
    log = tmp_path / "log"

    def start(kind: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", script, str(log), kind])

    slow = start("slow")
    assert eventually(log.exists, 30)
    others = [start("quick") for _ in range(3)]
    slow.send_signal(signal.SIGKILL)
    slow.wait()
    assert [other.wait(60) for other in others] == [0, 0, 0]
    assert log.read_text() == "built\n" * 2
    assert kept(own_cache) == 1


def test_a_damaged_template_is_built_again(own_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "a.sql").write_text("CREATE TABLE t (n int)")

    def use() -> None:
        with (
            Cluster() as cluster,
            cluster.template("app", tmp_path / "a.sql").database() as db,
            db.connect() as connection,
        ):
            connection.execute("SELECT * FROM t")

    use()
    (manifest,) = own_cache.glob("images/*template*/manifest.json")
    victim = max((manifest.parent / "data/base").glob("*/1259"), key=lambda p: int(p.parent.name))
    victim.write_bytes(b"")
    use()
    assert victim.stat().st_size > 0


def test_stopping_leaves_nothing_of_several_servers(tmp_path: Path) -> None:
    (tmp_path / "a.sql").write_text("CREATE TABLE t (n int)")
    with Cluster() as cluster:
        directories = [cluster.server.data_dir]
        app = cluster.template("app", tmp_path / "a.sql")
        directories.append(app._server.data_dir)
        app.database()
    assert directories[0] != directories[1]
    assert [leftovers(one) for one in directories] == [[], []]


def test_what_changes_while_it_is_built_is_not_kept(own_cache: Path, tmp_path: Path) -> None:
    """Else the new content would be found under the hash of the old."""
    path = tmp_path / "a.sql"
    path.write_text("SELECT pg_sleep(1); CREATE TABLE t (n int)")
    with Cluster() as cluster, ThreadPoolExecutor(1) as thread:
        building = thread.submit(cluster.template, "app", path)
        assert eventually(lambda: "psql" in children(os.getpid()).values(), 20)
        path.write_text("CREATE TABLE other (n int)")
        with pytest.raises(ClusterError, match="have changed since"):
            building.result(30)
        assert kept(own_cache) == 0
        with cluster.template("app", path).database() as db, db.connect() as connection:
            connection.execute("SELECT * FROM other")


@pytest.mark.slow
def test_what_begins_with_something_that_is_not_kept_is_not_kept(
    own_cache: Path, tmp_path: Path, daemon: type[Daemon]
) -> None:
    (tmp_path / "a.sql").write_text("CREATE TABLE t (n int)")
    counts = []
    for _ in range(2):
        daemon(
            "--template", f"upper:base={tmp_path / 'a.sql'}", "--template", "base=cmd:true"
        ).end()
        counts.append(kept(own_cache))
    assert counts[0] == counts[1]


def test_a_half_written_image_disturbs_nobody(own_cache: Path, tmp_path: Path) -> None:
    """What a builder that was killed left behind is not looked at."""
    (own_cache / "images" / "15-x.building").mkdir()
    (own_cache / "images" / "15-x.building" / "manifest.json").write_text("{")
    (own_cache / "images" / "15-y").mkdir()
    (own_cache / "images" / "15-y" / "manifest.json").write_text("{")
    (tmp_path / "a.sql").write_text("CREATE TABLE t (n int)")
    with Cluster() as cluster:
        cluster.template("app", tmp_path / "a.sql").database().close()


def test_several_steps_of_any_kind(own_cache: Path, tmp_path: Path) -> None:
    """In turn; and what is no step is told."""
    (tmp_path / "a.sql").write_text("CREATE TABLE a (n int)")

    def more(uri: str) -> None:
        with psycopg.connect(uri) as connection:
            connection.execute("CREATE TABLE b AS SELECT * FROM a")

    with Cluster() as cluster:
        steps = [tmp_path / "a.sql", more, "cmd:psql $DATABASE_URL -qc 'ALTER TABLE b ADD m int'"]
        for name, key in (("built", None), ("kept", "1")):
            template = cluster.template(name, steps, key=key)
            with template.database() as db, db.connect() as connection:
                connection.execute("SELECT n, m FROM b")
        for wrong in (123, [1], None, {"a": 1}):
            with pytest.raises(OptionError, match="is not a valid build"):
                cluster.template("wrong", wrong)  # type: ignore[arg-type]
