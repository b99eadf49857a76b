"""A tenant blocks its server: other clients are served, and SIGTERM stops the daemon."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from conftest import leftovers
from pgtemp.host import procfs
from pgtemp.programs.installation import Installation
from pgtemp.supervisor.crash import postgres_in
from pgtemp.wire.messages import startup_message
from support import Daemon, at, children, eventually, one

DaemonType = type[Daemon]
Tenant = psycopg.Connection[Any]
BOTH = pytest.mark.parametrize("isolation", ["database", "cluster"])
END_SECONDS = 5.0  # SIGTERM stops the daemon within this time


@contextmanager
def tenant_of(served: Daemon, dbname: str = "test~tenant") -> Iterator[Tenant]:
    """A client that may be in the middle of a statement when its block ends."""
    with closing(psycopg.connect(at(served, dbname), autocommit=True)) as tenant:
        yield tenant


def program(tenant: Tenant, command: str) -> None:
    """Run a shell command as the server user, in the data directory."""
    tenant.execute(f"COPY (SELECT 1) TO PROGRAM 'cat >/dev/null; {command}'")  # type: ignore[arg-type]


def ask(tenant: Tenant, query: str) -> Any:
    row = tenant.execute(query).fetchone()  # type: ignore[arg-type]
    assert row is not None
    return row[0]


def data_of(tenant: Tenant) -> Path:
    return Path(ask(tenant, "SHOW data_directory"))


def stop(*pids: int) -> None:
    """Stop processes, and wait until they are stopped."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    assert eventually(lambda: all(procfs.is_stopped(pid) for pid in pids))


def postmaster_of(tenant: Tenant) -> int:
    backend = int(ask(tenant, "SELECT pg_backend_pid()"))
    return int(Path(f"/proc/{backend}/stat").read_text().rpartition(")")[2].split()[1])


def block_postmaster(tenant: Tenant) -> None:
    """Make the postmaster read a pipe: it is not stopped but answers no client."""
    postmaster = postmaster_of(tenant)
    program(tenant, "rm pg_hba.conf; mkfifo pg_hba.conf")
    tenant.execute("SELECT pg_reload_conf()")
    wchan = Path(f"/proc/{postmaster}/wchan")
    assert eventually(lambda: wchan.read_text() in ("wait_for_partner", "fifo_open"))


def lock_catalogs(tenant: Tenant) -> None:
    tenant.execute("BEGIN; LOCK pg_database IN ACCESS EXCLUSIVE MODE")


def backends(tenant: Tenant, condition: str) -> list[int]:
    rows = tenant.execute(f"SELECT pid FROM pg_stat_activity WHERE {condition}")  # type: ignore[arg-type]
    return [pid for (pid,) in rows.fetchall()]


STOPPED: dict[str, Callable[[Tenant], list[int]]] = {
    "the postmaster": lambda tenant: [postmaster_of(tenant)],
    "its own backend": lambda tenant: backends(tenant, "pid = pg_backend_pid()"),
    "pgtemp's backends": lambda tenant: backends(tenant, "application_name = 'pgtemp'"),
    "the checkpointer": lambda tenant: backends(tenant, "backend_type = 'checkpointer'"),
    "all": lambda tenant: postgres_in(str(data_of(tenant))),
}


def is_served(served: Daemon, dbname: str = "test") -> bool:
    """Whether a new client gets a database in which it can work."""
    with psycopg.connect(at(served, dbname), autocommit=True, connect_timeout=30) as client:
        client.execute("CREATE TEMP TABLE t AS SELECT 1 AS n")
        return client.execute("SELECT n FROM t").fetchone() == (1,)


@contextmanager
def stopped_in_time(served: Daemon, *data_dirs: Path) -> Iterator[None]:
    """SIGTERM stops the daemon within five seconds after the block, and nothing is left."""
    try:
        yield
    except BaseException:
        served.process.kill()
        raise
    served.process.send_signal(signal.SIGTERM)
    try:
        assert served.process.wait(END_SECONDS) == 0
    finally:
        served.end(signal.SIGKILL)
    assert eventually(lambda: not any(map(leftovers, data_dirs)))


@BOTH
@pytest.mark.parametrize(
    "command",
    [
        "mkfifo postmaster.pid",
        "ln -s /dev/zero postmaster.pid",
        "mkfifo pg_hba.conf",
        "ln -s /dev/zero postgresql.auto.conf",
        "ln -s ../lease postgresql.conf",
    ],
)
def test_special_files_in_place_of_files_that_pgtemp_reads(
    daemon: DaemonType, isolation: str, command: str
) -> None:
    """A pipe, a device or a link does not block the daemon.

    Other clients keep and get databases.
    """
    served = daemon("--isolation", isolation)
    with tenant_of(served) as tenant, tenant_of(served, "test") as other:
        data = data_of(tenant)
        with stopped_in_time(served, data, data_of(other)):
            program(tenant, f"rm {command.split()[-1]}; {command}")
            assert all(is_served(served) for _ in range(4))
            assert ask(other, "SELECT 2") == 2
            tenant.close()
            assert all(is_served(served) for _ in range(4))
            assert is_served(served, "test~tenant")
            assert isolation == "database" or eventually(lambda: not leftovers(data))


@BOTH
@pytest.mark.parametrize("what", STOPPED)
def test_stopped_processes(daemon: DaemonType, isolation: str, what: str) -> None:
    """Whichever process a tenant stops, new clients are served, if necessary from a new server."""
    served = daemon("--isolation", isolation)
    for _ in range(6):  # until pgtemp has its own connections and directories to recycle
        assert is_served(served)
    with tenant_of(served) as tenant:
        data = data_of(tenant)
        with stopped_in_time(served, data):
            stop(*STOPPED[what](tenant))
            assert all(is_served(served) for _ in range(8))


@BOTH
@pytest.mark.parametrize("what", ["the postmaster", "all"])
def test_a_lease_that_ends_in_a_stopped_server(
    daemon: DaemonType, isolation: str, what: str
) -> None:
    """The leak check is impossible: the server is replaced and stopped."""
    served = daemon("--isolation", isolation)
    with tenant_of(served) as tenant:
        data = data_of(tenant)
        with stopped_in_time(served, data):
            stop(*STOPPED[what](tenant))
            tenant.close()
            assert all(is_served(served) for _ in range(8))
            assert eventually(lambda: not leftovers(data), 30)


@BOTH
@pytest.mark.parametrize("block", [block_postmaster, lock_catalogs])
def test_a_server_that_is_not_stopped_but_does_not_answer(
    daemon: DaemonType, isolation: str, block: Callable[[Tenant], None]
) -> None:
    """After a deadline it is replaced, and the clients that waited for it get another server."""
    served = daemon("--isolation", isolation)
    with tenant_of(served) as tenant, stopped_in_time(served, data_of(tenant)):
        block(tenant)

        assert all(is_served(served) for _ in range(10))


def test_a_backend_that_waits_for_a_program(daemon: DaemonType) -> None:
    """A backend that waits for a program ignores signals; its server stops nevertheless."""
    served = daemon()
    for _ in range(6):
        assert is_served(served)
    with tenant_of(served) as tenant:
        data = data_of(tenant)
        with stopped_in_time(served, data):
            tenant.execute("CREATE TABLE t (t text)")
            tenant.pgconn.send_query(b"COPY t FROM PROGRAM 'exec sleep 1000'")
            tenant.pgconn.flush()
            assert all(is_served(served) for _ in range(8))


@pytest.mark.parametrize(
    "command",
    [
        "setsid sleep 100",
        "exec setsid sleep 100",
        '(setsid sh -c "sleep 100; true"; true) | cat',
        "setsid sleep 100 & exit",
        'cp "$(command -v sleep)" postgres-x; exec setsid ./postgres-x 100',
    ],
)
def test_a_program_that_leaves_the_process_group_of_its_backend(
    daemon: DaemonType, command: str, open_dir: Path, programs: Installation
) -> None:
    """The shutdown of persisted data waits for no program of a tenant, and is clean."""
    served = daemon("--isolation", "cluster", "--persist", "--data-dir-prefix", str(open_dir))
    with tenant_of(served) as tenant, stopped_in_time(served):
        data = data_of(tenant)
        tenant.execute("CREATE TABLE t (t text)")
        backend = int(ask(tenant, "SELECT pg_backend_pid()"))
        tenant.pgconn.send_query(f"COPY t FROM PROGRAM '{command}'".encode())
        tenant.pgconn.flush()
        wchan = Path(f"/proc/{backend}/wchan")
        assert eventually(lambda: "pipe" in wchan.read_text() and runs("100", data))
    assert not runs("100", data)
    assert cluster_state(programs, data) == "shut down"


def runs(argument: str, cwd: Path) -> bool:
    """Whether a process with that last argument has this working directory."""
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            argv = (place / "cmdline").read_bytes().split(b"\0")
            if argv[-2:-1] == [argument.encode()] and (place / "cwd").readlink() == cwd:
                return True
    return False


def recycling_process_of(served: Daemon) -> int:
    """The process that restores directories of dropped databases."""

    def found() -> list[int]:
        supervisors = list(children(served.process.pid))
        return [
            pid
            for supervisor in supervisors
            for pid, name in children(supervisor).items()
            if not name.startswith("postgres")
        ]

    for _ in range(6):
        assert is_served(served)
    assert eventually(lambda: len(found()) == 1)
    return found()[0]


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_stopped_or_killed_recycling_process(daemon: DaemonType, number: signal.Signals) -> None:
    """Databases are created and dropped in the usual way if it is stopped or killed."""
    served = daemon()
    with tenant_of(served) as tenant, stopped_in_time(served, data_of(tenant)):
        os.kill(recycling_process_of(served), number)
        assert all(is_served(served) for _ in range(12))
        server = ask(tenant, "SELECT pg_postmaster_start_time()")
        assert one(at(served, "test"), "SELECT pg_postmaster_start_time()") == server


@pytest.mark.parametrize("stuck", ["stopped", "blocked"])
def test_one_session_does_not_use_up_the_threads(daemon: DaemonType, stuck: str) -> None:
    """Many connections to a session whose server is stuck do not exclude other clients."""
    served = daemon("--isolation", "cluster")
    with (
        tenant_of(served) as tenant,
        ExitStack() as connections,
        stopped_in_time(served, data_of(tenant)),
    ):
        if stuck == "stopped":
            stop(postmaster_of(tenant))
        else:
            block_postmaster(tenant)
        for number in range(200):
            one_more = connections.enter_context(
                socket.create_connection(("127.0.0.1", served.port))
            )
            parameters = {"user": f"u{number}", "database": "test~tenant"}
            one_more.sendall(startup_message(parameters))
        assert all(is_served(served) for _ in range(8))


@BOTH
@pytest.mark.parametrize("what", ["the postmaster", "its own backend", "all"])
def test_persisted_data_is_shut_down_cleanly(
    daemon: DaemonType, isolation: str, what: str, open_dir: Path, programs: Installation
) -> None:
    """With --persist, stopped processes are continued, so that no data needs a recovery."""
    served = daemon("--isolation", isolation, "--persist", "--data-dir-prefix", str(open_dir))
    with tenant_of(served) as tenant, stopped_in_time(served):
        data = data_of(tenant)
        tenant.execute("CREATE TABLE t AS SELECT 1")
        stop(*STOPPED[what](tenant))
    assert cluster_state(programs, data) == "shut down"


def cluster_state(programs: Installation, data: Path) -> str:
    """The state of a data directory that no server uses."""
    output = subprocess.run(
        [programs.program("pg_controldata"), data], capture_output=True, text=True, check=True,
        env={"LC_ALL": "C"},
    ).stdout  # fmt: skip
    return "".join(re.findall(r"cluster state: +(.*)\n", output))
