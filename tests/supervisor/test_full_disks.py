"""Full disks: said with where and how much, survived by who can, and nothing half-made is left."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import asyncpg
import psycopg
import pytest

from disks import Disk
from pgtemp import Cluster, PgTempDB
from pgtemp.errors import DiskFullError, PgTempError, TransferError
from pgtemp.host import ports
from project import Project
from support import Daemon, eventually, run_pgtemp

pytestmark = pytest.mark.slow
DaemonType = type[Daemon]
Mount = Callable[..., Disk]
KINDS = pytest.mark.parametrize("kind", ["tmpfs", "ext4", "inodes"])
BOTH = pytest.mark.parametrize("isolation", ["database", "cluster"])
ALL = pytest.mark.parametrize(
    "mode", [["--isolation", "database"], ["--isolation", "cluster"], ["--single"]], ids=" ".join
)
FREE = r"\d+ MB free|no free inodes"
TOO_MUCH = "CREATE TABLE t AS SELECT repeat('x', 1000) FROM generate_series(1, 1000000)"


@pytest.fixture
def disk(open_dir: Path) -> Iterator[Mount]:
    """Mounts a small disk; in the end nothing of a server is on it, and nobody holds it."""
    mounted: list[Disk] = []

    def mount(size: int, kind: str = "tmpfs") -> Disk:
        one = Disk(kind, open_dir, size)
        one.mount()
        mounted.append(one)
        return one

    yield mount
    for one in Daemon.running.copy():
        one.end()
    for disk in mounted:
        left = [] if eventually(lambda: not disk.homes) else disk.homes  # noqa: B023
        disk.unmount()
        assert left == []


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Mount:
    """Makes a disk the cache of this test."""

    def use(disk: Disk) -> Disk:
        monkeypatch.setenv("PGTEMP_CACHE_DIR", str(disk.path / "cache"))
        return disk

    return use


def says_where(error: BaseException | str, disk: Disk) -> bool:
    """Whether an error names the disk and how much is free there."""
    said = str(error)
    return str(disk.path) in said and re.search(FREE, said) is not None


def refusal(uri: str) -> asyncpg.PostgresError | None:
    """Why a client is turned away, in PostgreSQL's words; None where it is not."""

    async def connect() -> asyncpg.PostgresError | None:
        try:
            await (await asyncpg.connect(uri, timeout=60)).close()
        except asyncpg.PostgresError as error:
            return error
        return None

    return asyncio.run(connect())


def first_refusal(uri: str) -> tuple[list[psycopg.Connection], asyncpg.PostgresError]:
    """Take what is ready; who comes then, and why it is turned away."""
    holding = []
    for _ in range(20):
        if (error := refusal(uri)) is not None:
            return holding, error
        try:
            holding.append(psycopg.connect(uri, autocommit=True))
        except psycopg.OperationalError:
            continue
    raise AssertionError("nobody was turned away")


def somewhere() -> str:
    """A URL that a daemon can serve at."""
    return f"postgresql://postgres@localhost:{ports.free_port('127.0.0.1')}/app"


def crash(uri: str) -> None:
    """Let a server write a checkpoint, which it cannot on a full disk, and ends over."""
    with suppress(psycopg.Error), psycopg.connect(uri, autocommit=True) as connection:
        connection.execute("CHECKPOINT")


def serves(uri: str) -> bool:
    """Whether a client gets a database in which it can work."""
    try:
        with psycopg.connect(uri, autocommit=True) as connection:
            connection.execute("CREATE TABLE works AS SELECT repeat('x', 1000) AS n")
            return connection.execute("DROP TABLE works").statusmessage == "DROP TABLE"
    except psycopg.Error:
        return False


def fill_by_rows(connection: psycopg.Connection, kind: str = "") -> psycopg.Error:
    """Insert until PostgreSQL says that there is no room; what it says."""
    connection.execute(f"CREATE {kind} TABLE greedy (t text)")
    with pytest.raises(psycopg.Error) as caught:
        for _ in range(1000):
            connection.execute(
                "INSERT INTO greedy SELECT repeat('x', 1000) FROM generate_series(1, 1000)"
            )
    return caught.value


# The library


@KINDS
def test_initdb_without_room_leaves_nothing(kind: str, disk: Mount, own_cache: Mount) -> None:
    """One error says where and how much is free; once there is room, the image is built."""
    small = own_cache(disk(100, kind))
    small.fill(leave_little=True)
    with pytest.raises(DiskFullError) as caught:
        PgTempDB().start()
    assert says_where(caught.value, small)
    assert not list(small.path.glob("cache/images/*.building"))
    assert not list(small.path.glob("cache/programs/*.building"))
    small.clear()
    with PgTempDB() as db, db.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


@KINDS
def test_a_server_without_room_leaves_nothing(kind: str, disk: Mount) -> None:
    """The error says where there is no room, and how much there is; and is a DiskFullError."""
    small = disk(100, kind)
    for little in (True, False):
        small.fill(leave_little=little)
        with pytest.raises(DiskFullError) as caught:
            PgTempDB(data_dir_prefix=small.path).start()
        assert says_where(caught.value, small)
        assert eventually(lambda: not small.homes)
    small.clear()
    with PgTempDB(data_dir_prefix=small.path) as db, db.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_template_too_large_for_its_disk(disk: Mount, tmp_path: Path, cache: Path) -> None:
    """The error of a build says where; nothing of it is kept, and the cluster goes on."""
    small = disk(120)
    dump = tmp_path / "big.sql"
    dump.write_text(TOO_MUCH)
    before = templates_in(cache)
    with Cluster(data_dir_prefix=small.path) as cluster:
        with pytest.raises(TransferError) as caught:
            cluster.template("big", dump)
        assert says_where(caught.value, small)
        assert templates_in(cache) == before

        def build(uri: str) -> None:
            with psycopg.connect(uri) as connection:
                connection.execute(TOO_MUCH)

        with pytest.raises(psycopg.Error):  # its own error, as it is
            cluster.template("called", build)
        assert eventually(lambda: serves_from(cluster))


def templates_in(cache: Path) -> set[Path]:
    """The images of templates, those that are being built among them."""
    return {one for one in cache.glob("images/*-template-*") if one.suffix != ".lock"}


def serves_from(cluster: Cluster) -> bool:
    try:
        with cluster.database() as db, db.connect() as connection:
            return connection.execute("SELECT 1").fetchone() == (1,)
    except (PgTempError, psycopg.Error):
        return False


@KINDS
def test_a_template_that_the_cache_has_no_room_for(
    kind: str, disk: Mount, own_cache: Mount, tmp_path: Path
) -> None:
    """It is said where the image could not be published; then there is room, and it is."""
    small = own_cache(disk(200, kind))
    schema = tmp_path / "schema.sql"
    schema.write_text("CREATE TABLE t (n int)")
    with Cluster() as cluster:
        cluster.database().close()  # so that initdb's image is there
        small.fill(leave_little=True)
        with pytest.raises(DiskFullError) as caught:
            cluster.template("app", schema)
        assert says_where(caught.value, small)
        assert not list(small.path.glob("cache/images/*.building"))
        assert serves_from(cluster)
        small.clear()
        with cluster.template("app", schema).database() as db, db.connect() as connection:
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)


@KINDS
def test_copies_of_a_database_without_room(kind: str, disk: Mount) -> None:
    """What copies a database says so before PostgreSQL ends over it, and the database goes on."""
    small = disk(200, kind)
    with Cluster(data_dir_prefix=small.path) as cluster, cluster.database() as db:
        with db.connect() as connection:
            connection.execute("CREATE TABLE t AS SELECT 1 AS n")
        snapshot = db.snapshot("before")
        pid = cluster.server.pid
        small.fill(leave_little=True)
        for copy in (lambda: db.snapshot("after"), db.fork, lambda: db.restore(snapshot)):
            with pytest.raises(DiskFullError) as caught:
                copy()
            assert says_where(caught.value, small)
        with cluster.database() as other, other.connect(autocommit=True) as witness:
            small.fill()
            for copy in (lambda: db.snapshot("after"), db.fork, lambda: db.restore(snapshot)):
                with pytest.raises(DiskFullError):
                    copy()
            assert witness.execute("SELECT 1").fetchone() == (1,), "the server went on"
            small.clear()
            small.fill(leave_little=True)
        taken = []
        with pytest.raises(DiskFullError) as caught:
            for _ in range(10):
                taken.append(cluster.database())
        assert says_where(caught.value, small)
        with db.connect() as connection:
            connection.execute("INSERT INTO t VALUES (2)")
        small.clear()
        for one in taken:
            one.close()
        db.restore(snapshot)
        with db.connect() as connection:
            assert connection.execute("SELECT n FROM t").fetchall() == [(1,)]
        assert serves_from(cluster)
        assert cluster.server.pid == pid
        cluster.server.check()


@KINDS
def test_a_server_that_ended_over_a_full_disk_says_so(kind: str, disk: Mount) -> None:
    """A server that cannot come back because its disk is full is found out, and taken away."""
    small = disk(100, kind)
    db = PgTempDB(data_dir_prefix=small.path).start()

    def died() -> bool:
        crash(db.uri)
        try:
            db.check()
        except DiskFullError as error:
            return says_where(error, small)
        return False

    with small.kept_full():
        assert eventually(died, 60)
        db.stop()
    assert eventually(lambda: not small.homes)


def test_a_dump_without_room_leaves_no_file(disk: Mount) -> None:
    """Whether asked for or made at the end; the server goes on, or is ended."""
    small = disk(3)
    with PgTempDB() as db:
        with db.connect() as connection:
            connection.execute(
                "CREATE TABLE t AS SELECT repeat('x', 1000) FROM generate_series(1, 10000)"
            )
        with pytest.raises(TransferError) as caught:
            db.dump(small.path / "out.sql")
        assert says_where(caught.value, small)
        assert list(small.path.iterdir()) == []
        with db.connect() as connection:
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (10000,)
    db = PgTempDB(dump=small.path / "out.sql").start()
    small.fill()
    data_dir = db.data_dir
    with pytest.raises(TransferError) as caught:
        db.stop()
    assert says_where(caught.value, small)
    assert list(small.path.iterdir()) == [small.ballast]
    assert eventually(lambda: not data_dir.exists())


def test_kept_data_without_a_note_is_kept(disk: Mount) -> None:
    """The disk fills up before the end: that is said, the server is ended, its data stays."""
    small = disk(100, "ext4")
    db = PgTempDB(data_dir_prefix=small.path, persist=True).start()
    with db.connect(autocommit=True) as connection:
        # Else it is in memory for a while, and a shutdown that fails on a full disk loses it.
        connection.execute("SET synchronous_commit TO on")
        connection.execute("CREATE TABLE t AS SELECT 7 AS n")
    small.fill()
    with pytest.raises(DiskFullError) as caught:
        db.stop()
    assert says_where(caught.value, small)
    (kept,) = small.homes
    assert eventually(lambda: {path.name for path in kept.iterdir()} == {"data", "server.log"})
    # On a full disk it cannot be opened, and stays as it is.
    small.fill()
    refused = run_pgtemp("open", str(kept))
    assert refused.returncode == 2 and says_where(refused.stderr, small)
    assert "Traceback" not in refused.stderr
    small.clear()
    process = subprocess.Popen(
        [sys.executable, "-m", "pgtemp", "open", str(kept)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        uri = [process.stdout.readline() for _ in range(2)][1].strip()
        with psycopg.connect(uri) as connection:
            assert connection.execute("SELECT n FROM t").fetchone() == (7,)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    subprocess.run(["rm", "-r", str(kept)], check=True)


# The daemon


@ALL
def test_a_daemon_without_room_does_not_begin(mode: list[str], disk: Mount) -> None:
    """One message says where; the exit status is 2, and nothing is left."""
    small = disk(100)
    small.fill(leave_little=True)
    served = run_pgtemp(*mode, "--data-dir-prefix", str(small.path), somewhere())
    assert served.returncode == 2
    assert says_where(served.stderr, small)
    assert "Traceback" not in served.stderr and served.stderr.count("pgtemp:") == 1
    assert eventually(lambda: not small.homes)


@BOTH
def test_a_daemons_template_too_large_for_its_disk(
    isolation: str, disk: Mount, tmp_path: Path
) -> None:
    """From the command line it ends the daemon; through the URL it is the editor's own error."""
    small = disk(150)
    dump = tmp_path / "big.sql"
    dump.write_text(TOO_MUCH)
    where = ["--isolation", isolation, "--data-dir-prefix", str(small.path)]
    served = run_pgtemp(*where, "--template", f"app={dump}", somewhere())
    assert served.returncode == 2
    assert says_where(served.stderr, small)
    assert "Traceback" not in served.stderr
    assert eventually(lambda: not small.homes)


@KINDS
@BOTH
def test_a_full_disk_refuses_who_is_new(
    isolation: str, kind: str, disk: Mount, daemon: DaemonType
) -> None:
    """With SQLSTATE 53100, where, and a hint; who is there goes on, and with room so does all."""
    small = disk(250, kind)
    served = daemon("--isolation", isolation, "--data-dir-prefix", str(small.path))
    with psycopg.connect(served.uri, autocommit=True) as here:
        here.execute("CREATE TABLE t AS SELECT 1 AS n")
        small.fill(leave_little=True)
        holding, error = first_refusal(served.uri)
        assert error.sqlstate == "53100"
        assert says_where(error, small)
        assert "free some space" in error.hint
        here.execute("INSERT INTO t VALUES (2)")
        for one in holding:
            one.close()
        small.clear()
        assert eventually(lambda: serves(served.uri))
        assert here.execute("SELECT count(*) FROM t").fetchone() == (2,)
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors


@BOTH
def test_what_was_opened_ahead_for_others_is_given_before_anybody_is_refused(
    isolation: str, disk: Mount, daemon: DaemonType
) -> None:
    """On a full disk a client of a new kind gets what waits for clients of another kind."""
    small = disk(250)
    served = daemon("--isolation", isolation, "--data-dir-prefix", str(small.path))
    known, new = (f"{served.uri}?application_name={name}" for name in ("known", "new"))
    with psycopg.connect(known, autocommit=True) as here:
        psycopg.connect(known).close()

        def opened_ahead() -> bool:
            if isolation == "cluster":
                return len(small.homes) >= 5  # one, two ready, two opened ahead
            query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'known'"
            return here.execute(query).fetchone() == (3,)

        assert eventually(opened_ahead)
        small.fill(leave_little=True)
        holding, error = first_refusal(new)
        assert error.sqlstate == "53100"
        with pytest.raises(psycopg.OperationalError) as caught:  # none was left for its kind
            psycopg.connect(known).close()
        assert says_where(caught.value, small)
        for one in holding:
            one.close()
    small.clear()


@ALL
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_one_lease_fills_the_disk_and_the_others_live_on(
    mode: list[str], kind: str, disk: Mount, daemon: DaemonType
) -> None:
    """It gets 53100; others read and write on, also while what filled the disk is dropped."""
    small = disk(250, kind)
    served = daemon(*mode, "--data-dir-prefix", str(small.path))
    with psycopg.connect(served.uri, autocommit=True) as here:
        here.execute("CREATE TABLE t AS SELECT 1 AS n")
        with psycopg.connect(served.uri, autocommit=True) as greedy:
            # Not logged, because the log on a full disk ends the server (see the next test).
            error = fill_by_rows(greedy, "UNLOGGED")
            assert error.sqlstate == "53100"
            here.execute("INSERT INTO t VALUES (2)")
            if mode == ["--single"]:
                greedy.execute("DROP TABLE greedy")
        assert eventually(lambda: small.free > 20 << 20)
        assert eventually(lambda: serves(served.uri))
        here.execute("INSERT INTO t VALUES (3)")
        assert here.execute("SELECT count(*) FROM t").fetchone() == (3,)
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors


@ALL
def test_a_lease_that_fills_the_disk_with_its_log_holds_nobody_up(
    mode: list[str], disk: Mount, daemon: DaemonType
) -> None:
    """PostgreSQL may end over it, with all who are in it; they hear so, and others are served."""
    small = disk(150)
    served = daemon(*mode, "--data-dir-prefix", str(small.path))
    with psycopg.connect(served.uri, autocommit=True) as here:
        with psycopg.connect(served.uri, autocommit=True) as greedy:
            fill_by_rows(greedy)
            with suppress(psycopg.Error):
                here.execute("CREATE TABLE t AS SELECT 1 AS n")
            with suppress(psycopg.Error):
                greedy.execute("DROP TABLE greedy")
        assert eventually(lambda: serves(served.uri), 60)
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors


@KINDS
@BOTH
def test_a_server_that_cannot_come_back_is_replaced(
    isolation: str, kind: str, disk: Mount, daemon: DaemonType
) -> None:
    """While the disk is full everybody new hears something; with room, there is a new server."""
    small = disk(250, kind)
    served = daemon("--isolation", isolation, "--data-dir-prefix", str(small.path))
    session = served.uri.replace("/test", "/test~one")
    psycopg.connect(session).close()
    with small.kept_full():
        for _ in range(8):
            crash(session)
            error = refusal(served.uri)
            assert error is None or error.sqlstate in ("53100", "57P02", "57P03")
    assert eventually(lambda: serves(served.uri), 60)
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors


def test_the_one_server_of_all_ends_over_a_full_disk(disk: Mount, daemon: DaemonType) -> None:
    """With --single it cannot be replaced: the daemon ends and says why."""
    small = disk(100, "ext4")
    served = daemon("--single", "--data-dir-prefix", str(small.path))

    def ended() -> bool:
        crash(served.uri)
        return served.process.poll() is not None

    with small.kept_full():
        assert eventually(ended, 60)
    status, errors = served.end()
    assert status == 2
    assert says_where(errors, small)
    assert "Traceback" not in errors


# What the daemon itself writes


@ALL
def test_a_daemon_that_cannot_log_serves_on(mode: list[str], disk: Mount, open_dir: Path) -> None:
    """Its log goes to a full disk: nothing is said, and everything is done."""
    small = disk(3)
    with open(small.path / "log", "w") as log:
        small.fill()
        arguments = [*mode, "--log-level", "debug"]
        with subprocess.Popen(
            [sys.executable, "-m", "pgtemp", *arguments, somewhere()],
            stdout=subprocess.PIPE, stderr=log, text=True,
        ) as process:  # fmt: skip
            try:
                assert process.stdout is not None
                uri = [process.stdout.readline() for _ in range(2)][1].strip()
                assert serves(uri) and serves(uri)
            finally:
                process.terminate()
                process.communicate(timeout=60)
        assert process.returncode == 0


def test_a_daemon_that_cannot_say_where_it_serves_ends(disk: Mount) -> None:
    """Standard output is on a full disk: one message, and status 2."""
    small = disk(3)
    with open(small.path / "out", "w") as out:
        small.fill()
        done = subprocess.run(
            [sys.executable, "-m", "pgtemp", somewhere()],
            stdout=out, stderr=subprocess.PIPE, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "No space left" in done.stderr


@ALL
def test_a_daemons_dump_without_room(mode: list[str], disk: Mount, daemon: DaemonType) -> None:
    """It is said and leaves no file; of a lease it is a line in the log, of all the end."""
    small = disk(3)
    served = daemon(*mode, "--dump", str(small.path / "out.sql"))
    small.fill()
    for _ in range(2):
        assert serves(served.uri)
    single = mode == ["--single"]
    status, errors = served.end()
    assert status == (2 if single else 0)
    assert says_where(errors, small)
    assert errors.count("could not be dumped") == (1 if single else 2)
    assert "Traceback" not in errors
    assert list(small.path.iterdir()) == [small.ballast]


@ALL
def test_a_daemon_keeps_data_on_a_full_disk(
    mode: list[str], disk: Mount, daemon: DaemonType
) -> None:
    """What cannot be written beside it is said; the data is kept, and the daemon ends."""
    small = disk(250, "ext4")
    served = daemon(*mode, "--persist", "--data-dir-prefix", str(small.path))
    with psycopg.connect(served.uri, autocommit=True) as connection:
        connection.execute("CREATE TABLE t AS SELECT 7 AS n")
        small.fill()
    status, errors = served.end()
    assert status == 0
    assert f"persisted {small.path}" in errors
    assert "Traceback" not in errors
    for home in small.homes:
        subprocess.run(["rm", "-r", str(home)], check=True)


# pytest


def test_a_failed_test_that_cannot_be_kept(project: Project, disk: Mount) -> None:
    """It is said at the end of the session, which ends as it would have."""
    small = disk(100, "ext4")
    project.kept = small.path
    result = project.run(
        text=f"""
        import os

        def test_fails(pgtemp):
            with pgtemp.connect() as connection:
                connection.execute("INSERT INTO account VALUES (1, 1)")
            with open({str(small.ballast)!r}, "wb") as file:
                status = os.statvfs(file.fileno())
                file.write(bytes(status.f_bavail * status.f_frsize - (5 << 20)))
            assert False

        def test_passes(pgtemp):
            pgtemp.connect().execute("SELECT 1")
        """
    )
    assert result.status == 1, result.output
    assert result.count("failed") == 1 and result.count("passed") == 1
    assert says_where(result.output, small), result.output
    assert "INTERNALERROR" not in result.output
    assert project.kept_databases() == {}
    assert not list(small.path.glob("pgtemp-failed/*/*"))
    subprocess.run(["rm", "-rf", str(small.path / "pgtemp-failed")], check=True)
