"""Full disks: errors name the disk and its free space, pgtemp recovers, and nothing is left."""

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
    """Mounts a small disk. At the end no server's directory is on it, and no process uses it."""
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
    """Uses a disk as the cache of this test."""

    def use(disk: Disk) -> Disk:
        monkeypatch.setenv("PGTEMP_CACHE_DIR", str(disk.path / "cache"))
        return disk

    return use


def names_disk(error: BaseException | str, disk: Disk) -> bool:
    """Whether an error names the disk and its free space."""
    message = str(error)
    return str(disk.path) in message and re.search(FREE, message) is not None


def refusal(uri: str) -> asyncpg.PostgresError | None:
    """The error with which a client is refused; None if it is not."""

    async def connect() -> asyncpg.PostgresError | None:
        try:
            await (await asyncpg.connect(uri, timeout=60)).close()
        except asyncpg.PostgresError as error:
            return error
        return None

    return asyncio.run(connect())


def first_refusal(uri: str) -> tuple[list[psycopg.Connection], asyncpg.PostgresError]:
    """Use all ready databases; the connections, and the first refusal."""
    holding = []
    for _ in range(20):
        if (error := refusal(uri)) is not None:
            return holding, error
        try:
            holding.append(psycopg.connect(uri, autocommit=True))
        except psycopg.OperationalError:
            continue
    raise AssertionError("no client was refused")


def free_uri() -> str:
    """A URL at which a daemon can listen."""
    return f"postgresql://postgres@localhost:{ports.free_port('127.0.0.1')}/app"


def crash(uri: str) -> None:
    """Start a checkpoint: on a full disk the server cannot write it, and exits."""
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
    """Insert rows until PostgreSQL reports that the disk is full; return its error."""
    connection.execute(f"CREATE {kind} TABLE greedy (t text)")
    with pytest.raises(psycopg.Error) as caught:
        for _ in range(1000):
            connection.execute(
                "INSERT INTO greedy SELECT repeat('x', 1000) FROM generate_series(1, 1000)"
            )
    return caught.value


# The library


@KINDS
def test_initdb_on_a_full_disk_leaves_nothing(kind: str, disk: Mount, own_cache: Mount) -> None:
    """One error names the disk and its free space. Once there is space, the image is built."""
    small = own_cache(disk(100, kind))
    small.fill(leave_little=True)
    with pytest.raises(DiskFullError) as caught:
        PgTempDB().start()
    assert names_disk(caught.value, small)
    assert not list(small.path.glob("cache/images/*.building"))
    assert not list(small.path.glob("cache/programs/*.building"))
    small.clear()
    with PgTempDB() as db, db.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


@KINDS
def test_a_server_on_a_full_disk_leaves_nothing(kind: str, disk: Mount) -> None:
    """The error names the disk and its free space, and is a DiskFullError."""
    small = disk(100, kind)
    for leave_little_space in (True, False):
        small.fill(leave_little=leave_little_space)
        with pytest.raises(DiskFullError) as caught:
            PgTempDB(data_dir_prefix=small.path).start()
        assert names_disk(caught.value, small)
        assert eventually(lambda: not small.homes)
    small.clear()
    with PgTempDB(data_dir_prefix=small.path) as db, db.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_template_too_large_for_its_disk(disk: Mount, tmp_path: Path, cache: Path) -> None:
    """The build's error names the disk; nothing is cached, and the cluster still works."""
    small = disk(120)
    dump = tmp_path / "big.sql"
    dump.write_text(TOO_MUCH)
    before = templates_in(cache)
    with Cluster(data_dir_prefix=small.path) as cluster:
        with pytest.raises(TransferError) as caught:
            cluster.template("big", dump)
        assert names_disk(caught.value, small)
        assert templates_in(cache) == before

        def build(uri: str) -> None:
            with psycopg.connect(uri) as connection:
                connection.execute(TOO_MUCH)

        with pytest.raises(psycopg.Error):  # PostgreSQL's own error, unchanged
            cluster.template("called", build)
        assert eventually(lambda: serves_from(cluster))


def templates_in(cache: Path) -> set[Path]:
    """The images of templates, including those that are being built."""
    return {one for one in cache.glob("images/*-template-*") if one.suffix != ".lock"}


def serves_from(cluster: Cluster) -> bool:
    try:
        with cluster.database() as db, db.connect() as connection:
            return connection.execute("SELECT 1").fetchone() == (1,)
    except (PgTempError, psycopg.Error):
        return False


@KINDS
def test_a_template_on_a_full_cache(
    kind: str, disk: Mount, own_cache: Mount, tmp_path: Path
) -> None:
    """The error names the disk of the image; once there is space, the template is built."""
    small = own_cache(disk(200, kind))
    schema = tmp_path / "schema.sql"
    schema.write_text("CREATE TABLE t (n int)")
    with Cluster() as cluster:
        cluster.database().close()  # so that initdb's image exists
        small.fill(leave_little=True)
        with pytest.raises(DiskFullError) as caught:
            cluster.template("app", schema)
        assert names_disk(caught.value, small)
        assert not list(small.path.glob("cache/images/*.building"))
        assert serves_from(cluster)
        small.clear()
        with cluster.template("app", schema).database() as db, db.connect() as connection:
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)


@KINDS
def test_copies_of_a_database_on_a_full_disk(kind: str, disk: Mount) -> None:
    """A copy fails before PostgreSQL exits for lack of space, and the database still works."""
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
            assert names_disk(caught.value, small)
        with cluster.database() as other, other.connect(autocommit=True) as witness:
            small.fill()
            for copy in (lambda: db.snapshot("after"), db.fork, lambda: db.restore(snapshot)):
                with pytest.raises(DiskFullError):
                    copy()
            assert witness.execute("SELECT 1").fetchone() == (1,), "the server still runs"
            small.clear()
            small.fill(leave_little=True)
        taken = []
        with pytest.raises(DiskFullError) as caught:
            for _ in range(10):
                taken.append(cluster.database())
        assert names_disk(caught.value, small)
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
def test_a_server_that_exited_because_of_a_full_disk(kind: str, disk: Mount) -> None:
    """pgtemp detects that it cannot restart because its disk is full, and removes it."""
    small = disk(100, kind)
    db = PgTempDB(data_dir_prefix=small.path).start()

    def has_exited() -> bool:
        crash(db.uri)
        try:
            db.check()
        except DiskFullError as error:
            return names_disk(error, small)
        return False

    with small.kept_full():
        assert eventually(has_exited, 60)
        db.stop()
    assert eventually(lambda: not small.homes)


def test_a_dump_on_a_full_disk_leaves_no_file(disk: Mount) -> None:
    """After `dump()` the server still runs; if the dump at the end fails, the server is stopped."""
    small = disk(3)
    with PgTempDB() as db:
        with db.connect() as connection:
            connection.execute(
                "CREATE TABLE t AS SELECT repeat('x', 1000) FROM generate_series(1, 10000)"
            )
        with pytest.raises(TransferError) as caught:
            db.dump(small.path / "out.sql")
        assert names_disk(caught.value, small)
        assert list(small.path.iterdir()) == []
        with db.connect() as connection:
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (10000,)
    db = PgTempDB(dump=small.path / "out.sql").start()
    small.fill()
    data_dir = db.data_dir
    with pytest.raises(TransferError) as caught:
        db.stop()
    assert names_disk(caught.value, small)
    assert list(small.path.iterdir()) == [small.ballast]
    assert eventually(lambda: not data_dir.exists())


def test_persisted_data_on_a_full_disk(disk: Mount) -> None:
    """If the disk is full at the end, an error reports it. The server stops, and its data stays."""
    small = disk(100, "ext4")
    db = PgTempDB(data_dir_prefix=small.path, persist=True).start()
    with db.connect(autocommit=True) as connection:
        # Otherwise it is in memory for a while, and a shutdown that fails on a full disk loses it.
        connection.execute("SET synchronous_commit TO on")
        connection.execute("CREATE TABLE t AS SELECT 7 AS n")
    small.fill()
    with pytest.raises(DiskFullError) as caught:
        db.stop()
    assert names_disk(caught.value, small)
    (persisted,) = small.homes
    assert eventually(lambda: {path.name for path in persisted.iterdir()} == {"data", "server.log"})
    # On a full disk the data cannot be opened, and stays unchanged.
    small.fill()
    refused = run_pgtemp("open", str(persisted))
    assert refused.returncode == 2 and names_disk(refused.stderr, small)
    assert "Traceback" not in refused.stderr
    small.clear()
    process = subprocess.Popen(
        [sys.executable, "-m", "pgtemp", "open", str(persisted)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        uri = [process.stdout.readline() for _ in range(2)][1].strip()
        with psycopg.connect(uri) as connection:
            assert connection.execute("SELECT n FROM t").fetchone() == (7,)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    subprocess.run(["rm", "-r", str(persisted)], check=True)


# The daemon


@ALL
def test_a_daemon_on_a_full_disk_does_not_start(mode: list[str], disk: Mount) -> None:
    """One message names the disk; the exit status is 2, and nothing is left."""
    small = disk(100)
    small.fill(leave_little=True)
    served = run_pgtemp(*mode, "--data-dir-prefix", str(small.path), free_uri())
    assert served.returncode == 2
    assert names_disk(served.stderr, small)
    assert "Traceback" not in served.stderr and served.stderr.count("pgtemp:") == 1
    assert eventually(lambda: not small.homes)


@BOTH
def test_a_daemons_template_too_large_for_its_disk(
    isolation: str, disk: Mount, tmp_path: Path
) -> None:
    """The daemon does not start, with an error that names the disk; nothing is left."""
    small = disk(150)
    dump = tmp_path / "big.sql"
    dump.write_text(TOO_MUCH)
    where = ["--isolation", isolation, "--data-dir-prefix", str(small.path)]
    served = run_pgtemp(*where, "--template", f"app={dump}", free_uri())
    assert served.returncode == 2
    assert names_disk(served.stderr, small)
    assert "Traceback" not in served.stderr
    assert eventually(lambda: not small.homes)


@KINDS
@BOTH
def test_new_clients_are_refused_on_a_full_disk(
    isolation: str, kind: str, disk: Mount, daemon: DaemonType
) -> None:
    """The error has SQLSTATE 53100, the disk and a hint.

    Connected clients still work; once there is space, new clients are served.
    """
    small = disk(250, kind)
    served = daemon("--isolation", isolation, "--data-dir-prefix", str(small.path))
    with psycopg.connect(served.uri, autocommit=True) as connected:
        connected.execute("CREATE TABLE t AS SELECT 1 AS n")
        small.fill(leave_little=True)
        holding, error = first_refusal(served.uri)
        assert error.sqlstate == "53100"
        assert names_disk(error, small)
        assert "free some space" in error.hint
        connected.execute("INSERT INTO t VALUES (2)")
        for one in holding:
            one.close()
        small.clear()
        assert eventually(lambda: serves(served.uri))
        assert connected.execute("SELECT count(*) FROM t").fetchone() == (2,)
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors


@BOTH
def test_warm_connections_are_used_up_before_a_client_is_refused(
    isolation: str, disk: Mount, daemon: DaemonType
) -> None:
    """On a full disk, a client of a new kind gets the database of another warm connection."""
    small = disk(250)
    served = daemon("--isolation", isolation, "--data-dir-prefix", str(small.path))
    known, new = (f"{served.uri}?application_name={name}" for name in ("known", "new"))
    with psycopg.connect(known, autocommit=True) as connected:
        psycopg.connect(known).close()

        def has_warm_connections() -> bool:
            if isolation == "cluster":
                # one lease, two in the pool, two with warm connections
                return len(small.homes) >= 5
            query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'known'"
            return connected.execute(query).fetchone() == (3,)

        assert eventually(has_warm_connections)
        small.fill(leave_little=True)
        holding, error = first_refusal(new)
        assert error.sqlstate == "53100"
        # None is left for its kind, except one that a client has just given back.
        given_back, refused = first_refusal(known)
        assert len(given_back) <= 1 and names_disk(refused, small)
        for one in (*holding, *given_back):
            one.close()
    small.clear()


@ALL
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_one_lease_fills_the_disk_and_the_others_continue(
    mode: list[str], kind: str, disk: Mount, daemon: DaemonType
) -> None:
    """It gets 53100. Other leases read and write, even while its database is dropped."""
    small = disk(250, kind)
    served = daemon(*mode, "--data-dir-prefix", str(small.path))
    with psycopg.connect(served.uri, autocommit=True) as connected:
        connected.execute("CREATE TABLE t AS SELECT 1 AS n")
        with psycopg.connect(served.uri, autocommit=True) as greedy:
            # Unlogged, because a server whose WAL fills the disk exits (see the next test).
            error = fill_by_rows(greedy, "UNLOGGED")
            assert error.sqlstate == "53100"
            connected.execute("INSERT INTO t VALUES (2)")
            if mode == ["--single"]:
                greedy.execute("DROP TABLE greedy")
        assert eventually(lambda: small.free > 20 << 20)
        assert eventually(lambda: serves(served.uri))
        connected.execute("INSERT INTO t VALUES (3)")
        assert connected.execute("SELECT count(*) FROM t").fetchone() == (3,)
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors


@ALL
def test_a_lease_that_fills_the_disk_with_wal(
    mode: list[str], disk: Mount, daemon: DaemonType
) -> None:
    """PostgreSQL may exit with all its clients; they get an error, and new clients are served."""
    small = disk(150)
    served = daemon(*mode, "--data-dir-prefix", str(small.path))
    with psycopg.connect(served.uri, autocommit=True) as connected:
        with psycopg.connect(served.uri, autocommit=True) as greedy:
            fill_by_rows(greedy)
            with suppress(psycopg.Error):
                connected.execute("CREATE TABLE t AS SELECT 1 AS n")
            with suppress(psycopg.Error):
                greedy.execute("DROP TABLE greedy")
        assert eventually(lambda: serves(served.uri), 60)
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors


@KINDS
@BOTH
def test_a_server_that_cannot_restart_is_replaced(
    isolation: str, kind: str, disk: Mount, daemon: DaemonType
) -> None:
    """While the disk is full, new clients get an error; once there is space, a new server."""
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


def test_a_single_server_exits_because_of_a_full_disk(disk: Mount, daemon: DaemonType) -> None:
    """With --single it cannot be replaced: the daemon exits and reports the reason."""
    small = disk(100, "ext4")
    served = daemon("--single", "--data-dir-prefix", str(small.path))

    def daemon_has_exited() -> bool:
        crash(served.uri)
        return served.process.poll() is not None

    with small.kept_full():
        assert eventually(daemon_has_exited, 60)
    status, errors = served.end()
    assert status == 2
    assert names_disk(errors, small)
    assert "Traceback" not in errors


# Files that the daemon itself writes


@ALL
def test_a_daemon_that_cannot_write_its_log_still_serves(
    mode: list[str], disk: Mount, open_dir: Path
) -> None:
    """Its log is on a full disk: it logs nothing and does everything else."""
    small = disk(3)
    with open(small.path / "log", "w") as log:
        small.fill()
        arguments = [*mode, "--log-level", "debug"]
        with subprocess.Popen(
            [sys.executable, "-m", "pgtemp", *arguments, free_uri()],
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


def test_a_daemon_that_cannot_print_its_url_exits(disk: Mount) -> None:
    """Standard output is on a full disk: one message, and status 2."""
    small = disk(3)
    with open(small.path / "out", "w") as out:
        small.fill()
        done = subprocess.run(
            [sys.executable, "-m", "pgtemp", free_uri()],
            stdout=out, stderr=subprocess.PIPE, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "No space left" in done.stderr


@ALL
def test_a_daemons_dump_on_a_full_disk(mode: list[str], disk: Mount, daemon: DaemonType) -> None:
    """It leaves no file.

    A lease's dump is a warning in the log; with --single it is the exit status.
    """
    small = disk(3)
    served = daemon(*mode, "--dump", str(small.path / "out.sql"))
    small.fill()
    for _ in range(2):
        assert serves(served.uri)
    single = mode == ["--single"]
    status, errors = served.end()
    assert status == (2 if single else 0)
    assert names_disk(errors, small)
    assert errors.count("could not be dumped") == (1 if single else 2)
    assert "Traceback" not in errors
    assert list(small.path.iterdir()) == [small.ballast]


@ALL
def test_a_daemon_persists_data_on_a_full_disk(
    mode: list[str], disk: Mount, daemon: DaemonType
) -> None:
    """The daemon reports files that it cannot write. It persists the data and exits."""
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


def test_a_failed_test_whose_database_cannot_be_persisted(project: Project, disk: Mount) -> None:
    """The session reports it at its end, with its usual exit status."""
    small = disk(100, "ext4")
    project.persist_dir = small.path
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
    assert names_disk(result.output, small), result.output
    assert "INTERNALERROR" not in result.output
    assert project.persisted_databases() == {}
    assert not list(small.path.glob("pgtemp-failed/*/*"))
    subprocess.run(["rm", "-rf", str(small.path / "pgtemp-failed")], check=True)
