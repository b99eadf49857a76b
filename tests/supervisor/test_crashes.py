"""Crashes of supervisors, postmasters, backends and clients: the errors, and the recovery."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from conftest import leftovers
from owner import is_running
from pgtemp import Cluster, ClusterError, PgTempDB
from pgtemp.host import ports
from pgtemp.supervisor import crash, supervision
from pgtemp.supervisor.crash import all_postgres, clear_crashed, postgres_in
from support import Daemon, children, eventually, homes

LOOP = b"DO $$ BEGIN LOOP END LOOP; END $$"
TABLES = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"


def postmaster_of(connection: psycopg.Connection[tuple[object, ...]]) -> int:
    row = connection.execute(
        "SELECT (string_to_array(pg_read_file('postmaster.pid'), E'\\n'))[1]"
    ).fetchone()
    assert row is not None
    return int(str(row[0]))


def test_a_killed_supervisor_stops_its_servers() -> None:
    """PostgreSQL exits by its parent-death signal.

    A new supervisor starts the next server, and `stop()` removes the run directory.
    """
    db = PgTempDB().start()
    data_dir = db.data_dir
    busy = db.connect()
    busy.pgconn.send_query(LOOP)
    os.kill(supervision.current().pid, signal.SIGKILL)
    assert eventually(lambda: postgres_in(str(data_dir)) == [])
    busy.close()
    with PgTempDB() as another, another.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert data_dir.exists(), "its owner runs, so no sweep may remove it"
    db.stop()
    assert not data_dir.parent.exists()


def test_a_killed_postmaster_leaves_no_busy_backend() -> None:
    """A busy backend outlives its postmaster; the error names the crash and quotes the log."""
    db = PgTempDB(config={"log_min_messages": "info"}).start()
    data_dir = db.data_dir
    busy = db.connect()
    with db.connect() as connection:
        connection.execute("DO $$ BEGIN RAISE LOG 'the last words'; END $$")
        pid = postmaster_of(connection)
    segment = (data_dir / "postmaster.pid").read_text().split("\n")[6].split()[1]
    busy.pgconn.send_query(LOOP)
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: postgres_in(str(data_dir)) == [])
    assert eventually(lambda: f" {segment} " not in Path("/proc/sysvipc/shm").read_text())
    with pytest.raises(ClusterError, match=f"pid {pid}.*killed by signal 9") as died:
        db.check()
    assert any("the last words" in line for line in died.value.details)
    busy.close()
    db.stop()
    assert leftovers(data_dir) == []


def test_a_server_without_a_recorded_segment_leaves_none() -> None:
    """A server creates its shared memory segment first, and records it a moment later."""
    db = PgTempDB().start()
    notes = db.data_dir / "postmaster.pid"
    lines = notes.read_text().splitlines()
    segment = lines[6].split()[1]
    assert f" {segment} " in Path("/proc/sysvipc/shm").read_text()
    notes.write_text("\n".join(lines[:6]))
    clear_crashed(str(db.data_dir))
    assert f" {segment} " not in Path("/proc/sysvipc/shm").read_text()
    db.stop()


def test_a_killed_server_of_a_cluster_is_an_error() -> None:
    """A request for a database raises an error with the crash and the end of the log."""
    with Cluster() as cluster:
        with cluster.database().connect() as connection:
            os.kill(postmaster_of(connection), signal.SIGKILL)
            assert eventually(lambda: _is_disconnected(connection))
        assert eventually(lambda: "killed by signal 9" in _refusal(cluster))


def _refusal(cluster: Cluster) -> str:
    """The error of a request for a database, once no ready database is left."""
    with pytest.raises(ClusterError) as refused:
        for _ in range(100):
            cluster.database().close()
    return str(refused.value)


def _is_disconnected(connection: psycopg.Connection[tuple[object, ...]]) -> bool:
    try:
        connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_other_clients_of_a_crashed_backend_get_the_reason(
    daemon: type[Daemon], number: int
) -> None:
    """They get an error with the reason; the daemon then leases new, empty databases."""
    served = daemon()
    with (
        psycopg.connect(served.uri, autocommit=True) as victim,
        psycopg.connect(served.uri, autocommit=True) as neighbour,
    ):
        neighbour.execute("CREATE TABLE t AS SELECT 1 AS n")
        row = victim.execute("SELECT pg_backend_pid()").fetchone()
        assert row is not None
        os.kill(row[0], number)
        messages: list[str] = []
        # libpq treats a FATAL that it reads right after the end of a query as a notice.
        neighbour.add_notice_handler(
            lambda notice: messages.append(f"{notice.message_primary} {notice.message_detail}")
        )
        with pytest.raises(psycopg.OperationalError) as caught:
            assert not eventually(lambda: _answers(neighbour))
        messages.append(str(caught.value))
        assert any("after a crash" in one for one in messages)
        assert any(f"terminated by signal {number}" in one for one in messages)
    assert eventually(lambda: _gets_empty_database(served.uri)), "it does not lease again"
    status, errors = served.end()
    assert status == 0
    assert "Traceback" not in errors


def _answers(connection: psycopg.Connection[tuple[object, ...]]) -> bool:
    """Always False; raises as soon as the connection is closed."""
    connection.execute("SELECT 1")
    return False


def _gets_empty_database(uri: str) -> bool:
    try:
        with psycopg.connect(uri, connect_timeout=10) as connection:
            return connection.execute(TABLES).fetchone() == (0,)
    except psycopg.OperationalError:
        return False


@pytest.mark.parametrize("isolation", ["database", "cluster"])
def test_a_killed_postmaster_of_a_daemon(daemon: type[Daemon], isolation: str) -> None:
    """Its busy backend is stopped, the next lease works, and the log names the crash."""
    before = homes()
    served = daemon("--isolation", isolation)
    with psycopg.connect(served.uri, autocommit=True) as connection:
        pid = postmaster_of(connection)
        found = [home for home in homes() - before if pid in postgres_in(f"{home}/data")]
        connection.pgconn.send_query(LOOP)
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: not [cwd for _, cwd in all_postgres() if str(found[0]) in cwd])
        assert eventually(lambda: _gets_empty_database(served.uri)), "it does not lease again"
        connection.close()
    _, errors = served.end()
    if isolation == "database":  # otherwise only its own lease is affected
        assert "was killed by signal 9" in errors
    assert "Traceback" not in errors
    assert eventually(lambda: homes() <= before)


def test_a_daemon_survives_its_supervisor_and_sweeps(daemon: type[Daemon]) -> None:
    """The servers exit with the supervisor.

    The daemon leases databases in new servers, and the leftovers are swept.
    """
    before = homes()
    served = daemon()
    psycopg.connect(served.uri).close()
    (pid,) = (p for p, name in children(served.process.pid).items() if name.startswith("python"))
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: _gets_empty_database(served.uri)), "it does not lease again"
    assert served.end()[0] == 0
    assert eventually(lambda: homes() <= before)


PID_1 = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.fixture
def namespace() -> list[str]:
    """A command prefix that runs a command as process 1 of a new pid namespace."""
    tried = subprocess.run([*PID_1, "true"], check=False, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no pid namespace can be made: {tried.stderr.strip()}")
    return PID_1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_as_process_1(namespace: list[str], number: int) -> None:
    """As in a container: signals stop the daemon, orphans are reaped, nothing is left."""
    before = homes()
    served = Daemon(before=namespace)
    (first,) = children(served.process.pid)
    with psycopg.connect(served.uri, autocommit=True) as connection:
        # A program that a backend starts, and whose parent exits before it.
        connection.execute("COPY (SELECT 1) TO PROGRAM '(sleep 0.2; exit 3) & exit 0'")
    pythons = [pid for pid, name in _tree(first).items() if name.startswith("python")]
    _, _, killed = pythons  # process 1, the daemon, its supervisor
    # the supervisor: process 1 is now the parent of its postmasters
    os.kill(killed, signal.SIGKILL)
    assert eventually(lambda: _gets_empty_database(served.uri))
    assert eventually(lambda: not _zombies(first)), _tree(first)
    busy = psycopg.connect(served.uri)
    busy.pgconn.send_query(LOOP)
    os.kill(first, number)
    served.process.wait(timeout=30)
    busy.close()
    status, errors = served.end()
    assert status == (130 if number == signal.SIGINT else 0)
    assert "Traceback" not in errors
    assert eventually(lambda: homes() <= before)


def _tree(pid: int) -> dict[int, str]:
    """A process and all its descendants, with their names."""
    try:
        found = {pid: Path(f"/proc/{pid}/comm").read_text().strip()}
    except OSError:  # it has exited
        return {}
    for child in children(pid):
        found |= _tree(child)
    return found


def test_ctrl_c_in_a_container(namespace: list[str], tmp_path: Path) -> None:
    """A terminal signals process 1 and the command; the command gets it once and exits cleanly."""
    port = ports.free_port("127.0.0.1")
    argv = [sys.executable, "-m", "pgtemp", "--single", "--dump", str(tmp_path / "out.sql")]
    argv.append(f"postgresql://postgres@localhost:{port}/test")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(namespace[0], [*namespace, *argv])
    output = b""
    while b"Ctrl-C" not in output:
        assert select.select([terminal], [], [], 60)[0], output.decode()
        output += os.read(terminal, 4096)
    with psycopg.connect(f"postgresql://postgres@localhost:{port}/test") as connection:
        connection.execute("CREATE TABLE kept (n int)")
    os.write(terminal, b"\x03")
    with suppress(OSError):  # the end of a terminal
        while os.read(terminal, 4096):
            pass
    os.waitpid(pid, 0)
    os.close(terminal)
    assert "CREATE TABLE public.kept" in (tmp_path / "out.sql").read_text()


def test_a_crash_is_reported_at_once(daemon: type[Daemon]) -> None:
    """The client does not wait until its lease has ended, which a stopped server delays."""
    served = daemon()
    with (
        psycopg.connect(served.uri, autocommit=True) as victim,
        psycopg.connect(served.uri, autocommit=True) as observer,
    ):
        postmaster = postmaster_of(observer)
        row = victim.execute("SELECT pg_backend_pid()").fetchone()
        assert row is not None
        os.kill(postmaster, signal.SIGSTOP)
        try:
            os.kill(int(str(row[0])), signal.SIGKILL)
            with pytest.raises(psycopg.errors.CrashShutdown):
                assert not eventually(lambda: _answers(victim))
            assert _state(postmaster) == "T", "it was reported only when the server continued"
        finally:
            os.kill(postmaster, signal.SIGCONT)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _zombies(pid: int) -> list[int]:
    return [one for one in _tree(pid) if not is_running(one)]


def test_a_tenant_that_keeps_starting_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The supervisor gives up after a second, even if each search for processes takes long."""
    now, searches = [0.0], []

    def search(_: int) -> list[int]:
        now[0] += 0.3
        searches.append(now[0])
        return [os.getpid()]  # it does not work in that directory, so it is not killed

    monkeypatch.setattr(crash, "_working_in", search)
    monkeypatch.setattr(crash, "_segments_removed", lambda *_: bool(search(0)) and False)
    monkeypatch.setattr(crash.time, "monotonic", lambda: now[0])
    (tmp_path / "data").mkdir()
    clear_crashed(str(tmp_path / "data"))
    assert searches[-1] < 3.0
