"""The daemon as users run it: a real process, real clients, real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import psycopg
import pytest

from pgtemp.host import ports
from pgtemp.supervisor.leftovers import PREFIX
from pgtemp.wire.messages import (
    startup_message,
)
from support import Daemon, at, children, eventually, homes, one, run_pgtemp

DaemonType = type[Daemon]


@pytest.mark.parametrize("isolation", ["database", "cluster"])
def test_each_connection_gets_its_own_database(
    daemon: DaemonType, any_version: str, isolation: str
) -> None:
    """Two simultaneous connections see different databases, as the user they named."""
    served = daemon("--pg-version", any_version, "--isolation", isolation)
    with psycopg.connect(served.uri) as one, psycopg.connect(served.uri) as two:
        one.execute("CREATE TABLE t AS SELECT 1 AS n")
        row = two.execute(
            "SELECT to_regclass('t'), current_user, current_setting('server_version_num')"
        ).fetchone()
        assert row is not None
        assert row[:2] == (None, "postgres")
        assert row[2].startswith(any_version)
        directories = {c.execute("SHOW data_directory").fetchone() for c in (one, two)}
        assert len(directories) == (1 if isolation == "database" else 2)


def test_single_takes_names_literally(daemon: DaemonType) -> None:
    """A tilde is part of the name; two names are two databases, which a client creates itself."""
    served = daemon("--single")
    with psycopg.connect(at(served, "test"), autocommit=True) as connection:
        for name in ("app~one", "app~two", "app~template"):
            connection.execute(f'CREATE DATABASE "{name}"'.encode())
    for name in ("app~one", "app~two", "app~template"):
        assert one(at(served, name), "SELECT current_database()::text") == name
        assert one(at(served, name), "SELECT count(*) FROM pg_class WHERE relname = 't'") == 0
        with psycopg.connect(at(served, name)) as connection:
            connection.execute("CREATE TABLE t ()")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(at(served, "app~three"))
    with pytest.raises(psycopg.OperationalError, match="with --single there are no sessions"):
        psycopg.connect(at(served, "test"), options="-c pgtemp.session=one")


def test_single_is_one_server_for_all(daemon: DaemonType) -> None:
    """Connections see each other's committed data; CREATE DATABASE works as in PostgreSQL."""
    served = daemon("--single")
    with psycopg.connect(served.uri, autocommit=True) as one:
        one.execute("CREATE TABLE t AS SELECT 1 AS n")
        one.execute("CREATE DATABASE another")
    with psycopg.connect(served.uri) as two:
        assert two.execute("SELECT n FROM t").fetchone() == (1,)
    with psycopg.connect(served.uri.replace("/test", "/another")) as three:
        assert three.execute("SELECT current_database()").fetchone() == ("another",)
    with pytest.raises(psycopg.OperationalError, match='database "nowhere" does not exist'):
        psycopg.connect(served.uri.replace("/test", "/nowhere"))


@pytest.mark.parametrize("isolation", ["database", "cluster"])
def test_any_user_and_any_database(daemon: DaemonType, isolation: str) -> None:
    """A client may name any user and any database.

    A lease that is a server has a database of the requested name.
    """
    served = daemon("--isolation", isolation)
    uri = f"postgresql://any%20one:secret@localhost:{served.port}/some%22thing"
    with psycopg.connect(uri) as connection:
        row = connection.execute("SELECT current_user, current_database()").fetchone()
        assert row is not None and row[0] == "any one"
        assert isolation == "database" or row[1] == 'some"thing'


def test_many_connections_at_once(daemon: DaemonType) -> None:
    """Each of many simultaneous clients gets its own server."""
    served = daemon("--pool", "2", "--isolation", "cluster")

    def use(number: int) -> int:
        with psycopg.connect(served.uri) as connection:
            connection.execute("CREATE TABLE t (n int)")
            connection.execute("INSERT INTO t VALUES (%s)", [number])
            rows = connection.execute("SELECT n FROM t").fetchall()
            assert len(rows) == 1
            return int(rows[0][0])

    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(use, range(16))) == list(range(16))


def test_asyncpg_and_its_cancel(daemon: DaemonType) -> None:
    """A driver without libpq: its timeout cancels the right query through the daemon."""
    served = daemon()

    async def use() -> None:
        connection = await asyncpg.connect(served.uri)
        with pytest.raises(asyncio.TimeoutError):
            await connection.fetchval("SELECT pg_sleep(60)", timeout=0.3)
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()

    asyncio.run(use())


def test_psycopg_cancels_its_own_query(daemon: DaemonType) -> None:
    served = daemon()
    with psycopg.connect(served.uri) as one, psycopg.connect(served.uri) as other:
        with ThreadPoolExecutor(1) as thread:
            pid = one.info.backend_pid
            asleep = thread.submit(one.execute, "SELECT pg_sleep(60)")
            wchan = Path(f"/proc/{pid}/cmdline")
            assert eventually(lambda: b"SELECT" in wchan.read_bytes())
            one.cancel_safe()
            with pytest.raises(psycopg.errors.QueryCanceled):
                asleep.result(30)
        assert other.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_signals_stop_everything(daemon: DaemonType, number: int, status: int) -> None:
    """A signal leaves no process and no directory, even with a client and a full pool."""
    before = homes()
    served = daemon()
    with psycopg.connect(served.uri) as connection:
        connection.execute("SELECT 1")
        exit_status, errors = served.end(number)
        assert (exit_status, errors) == (status, "")
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
        connection.close()
    assert eventually(lambda: homes() <= before)


def test_a_killed_daemon_leaves_nothing(daemon: DaemonType) -> None:
    before = homes()
    served = daemon()
    connection = psycopg.connect(served.uri)
    connection.execute("SELECT 1")
    served.end(signal.SIGKILL)
    connection.close()
    assert eventually(lambda: homes() <= before)


def test_a_signal_while_starting_leaves_nothing() -> None:
    """Ctrl-C at any moment of the daemon's start."""
    before = homes()
    for seconds in (0.1, 0.3, 0.5, 0.7):
        process = subprocess.Popen(
            [sys.executable, "-m", "pgtemp", f"postgresql://localhost:{ports.free_port('127.0.0.1')}/x"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors or seconds == 0.1, errors
    assert eventually(lambda: homes() <= before)


@pytest.mark.slow
def test_open_serves_a_persisted_server(daemon: DaemonType, open_dir: Path) -> None:
    """`--persist` persists each used database; `pgtemp open` serves it and does not change it."""
    served = daemon("--isolation", "cluster", "--persist", "--data-dir-prefix", str(open_dir))
    with psycopg.connect(served.uri) as connection:
        connection.execute("CREATE TABLE t AS SELECT 42 AS answer")
    psycopg.connect(served.uri).close()  # unused: not persisted
    assert eventually(lambda: len(list(open_dir.glob("*/pgtemp.json"))) == 1)
    _, errors = served.end()
    (persisted,) = open_dir.glob(f"{PREFIX}*")
    assert f"persisted {persisted}" in errors
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "pgtemp", "open", str(persisted)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        output = [process.stdout.readline() for _ in range(3)]
        with psycopg.connect(output[1].strip()) as connection:
            assert connection.execute("SELECT answer FROM t").fetchone() == (42,)
            refused = run_pgtemp("open", str(persisted))
            assert refused.returncode == 2 and "a server is running on" in refused.stderr
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
        assert (persisted / "data" / "PG_VERSION").exists()


def test_persist_with_databases_of_a_shared_server(daemon: DaemonType, open_dir: Path) -> None:
    """Each lease's database gets a readable name, and all are in one directory."""
    served = daemon("--persist", "--data-dir-prefix", str(open_dir))
    for number in (1, 2):
        with psycopg.connect(served.uri) as connection:
            connection.execute(f"CREATE TABLE t AS SELECT {number} AS n")
    _, errors = served.end()
    (persisted,) = open_dir.glob(f"{PREFIX}*")
    assert f"persisted {persisted}" in errors
    assert f"persisted database test_1 in {persisted}" in errors
    process = subprocess.Popen(
        [sys.executable, "-m", "pgtemp", "open", str(persisted)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    uri = [process.stdout.readline() for _ in range(3)][1].strip()
    for number in (1, 2):
        with psycopg.connect(uri, dbname=f"test_{number}") as connection:
            assert connection.execute("SELECT n FROM t").fetchone() == (number,)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


@pytest.mark.parametrize("isolation", ["database", "cluster"])
def test_persist_ignores_unused_databases(
    daemon: DaemonType, open_dir: Path, isolation: str
) -> None:
    served = daemon("--isolation", isolation, "--persist", "--data-dir-prefix", str(open_dir))
    psycopg.connect(served.uri).close()
    assert served.end() == (0, "")
    assert eventually(lambda: list(open_dir.iterdir()) == [])


def test_ttl_ends_a_lease_with_a_clear_error(daemon: DaemonType) -> None:
    served = daemon("--ttl", "0.5")
    connection = psycopg.connect(served.uri)
    with pytest.raises(psycopg.OperationalError, match="time limit was reached"):
        connection.execute("SELECT pg_sleep(30)")
    connection.close()


def test_clients_connect_over_the_unix_socket(daemon: DaemonType) -> None:
    served = daemon("--no-tcp")
    uri = served.output[1].strip()
    assert "host=" in uri
    with psycopg.connect(uri) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", served.port)).close()


def test_a_pg_hba_conf_that_requires_passwords(daemon: DaemonType, tmp_path: Path) -> None:
    """The password exchange of a server with its own pg_hba.conf is relayed in both directions."""
    hba = tmp_path / "hba.conf"
    hba.write_text("local all joe scram-sha-256\nlocal all all trust\n")
    served = daemon("--single", "--pg-hba-conf", str(hba))
    uri = f"postgresql://joe:geheim@localhost:{served.port}/test"
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(uri)
    with psycopg.connect(served.uri) as own:
        own.execute("ALTER ROLE joe PASSWORD 'geheim'")
    with psycopg.connect(uri) as connection:
        assert connection.execute("SELECT current_user").fetchone() == ("joe",)


def test_the_daemon_exits_when_the_single_server_is_killed(daemon: DaemonType) -> None:
    """Its data is lost, and a new server would hide that."""
    served = daemon("--single")
    with psycopg.connect(served.uri) as connection:
        row = connection.execute("SHOW data_directory").fetchone()
    assert row is not None
    os.kill(int((Path(row[0]) / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
    served.process.wait(timeout=30)
    status, errors = served.end()
    assert status == 2 and "was killed by signal 9" in errors and "Traceback" not in errors


def test_a_daemon_survives_its_supervisor(daemon: DaemonType) -> None:
    """A supervisor that is killed stops the current servers; the daemon leases new ones."""
    served = daemon("--pool", "1")
    (supervisor,) = children(served.process.pid)
    os.kill(supervisor, signal.SIGKILL)
    for _ in range(4):
        with psycopg.connect(served.uri) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    assert served.end()[0] == 0


def test_the_daemons_socket_survives_the_supervisor(daemon: DaemonType) -> None:
    """The next supervisor sweeps directories of the killed one, but not the daemon's own."""
    served = daemon("--pool", "1")
    directory = served.output[-1].partition("socket is in ")[2].partition(";")[0]
    by_socket = f"host={directory} port={served.port} user=postgres dbname=test"
    (supervisor,) = children(served.process.pid)
    with psycopg.connect(served.uri) as connection:
        row = connection.execute("SHOW data_directory").fetchone()
        assert row is not None
        os.kill(supervisor, signal.SIGKILL)
        with pytest.raises(psycopg.OperationalError):
            while True:
                connection.execute("SELECT 1")
    abandoned = Path(row[0]).parent
    psycopg.connect(served.uri).close()  # starts the sweep
    assert eventually(lambda: not abandoned.exists())
    with psycopg.connect(by_socket) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert served.end()[0] == 0
    assert not Path(directory).exists()


def test_sigterm_while_a_dump_is_loaded(tmp_path: Path) -> None:
    """SIGTERM does not wait for psql, and nothing is left."""
    before = homes()
    dump = tmp_path / "slow.sql"
    dump.write_text("SELECT pg_sleep(600);\n")
    uri = f"postgresql://localhost:{ports.free_port('127.0.0.1')}/x"
    process = subprocess.Popen(
        [sys.executable, "-m", "pgtemp", "--load-from", str(dump), uri],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert eventually(lambda: "psql" in children(process.pid).values(), 60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert eventually(lambda: homes() <= before)


def test_a_client_that_disconnects_at_once_is_not_identified(
    daemon: DaemonType, other_user: str
) -> None:
    """The kernel's table lists closed sockets under root's uid; they admit no client."""
    served = daemon("--log-level", "info")
    mark = Path("/tmp") / f"test-of-mark-{os.getpid()}"
    program = (
        "import socket, sys\n"
        "hello = bytes.fromhex(sys.argv[2])\n"
        "query = f\"COPY (SELECT 1) TO PROGRAM 'touch {sys.argv[3]}'\\0\".encode()\n"
        "query = b'Q' + (len(query) + 4).to_bytes(4, 'big') + query + b'X\\0\\0\\0\\4'\n"
        "for _ in range(50):\n"
        "    with socket.create_connection(('127.0.0.1', int(sys.argv[1]))) as s:\n"
        "        s.sendall(hello + query)\n"
    )
    hello = startup_message({"user": "postgres", "database": "test"}).hex()
    subprocess.run(
        ["/usr/bin/python3", "-c", program, str(served.port), hello, str(mark)],
        user=other_user, cwd="/", check=True, env={},
    )  # fmt: skip
    _, errors = served.end()
    assert not mark.exists()
    assert "lease 1:" not in errors


def test_another_local_user_is_refused(daemon: DaemonType, other_user: str) -> None:
    """Only the user who runs the daemon may connect by TCP or by the socket's directory."""
    served = daemon()
    directory = served.output[-1].partition("socket is in ")[2].partition(";")[0]
    for host in ("127.0.0.1", directory):
        command = ["psql", "-X", "-h", host, "-p", str(served.port), "-U", "postgres", "test"]
        result = subprocess.run(
            command,
            user=other_user,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd="/",
            check=False,
            env={"PATH": os.environ["PATH"]},
        )
        assert result.returncode == 2, result.stdout
        assert "uid" in result.stderr or "Permission denied" in result.stderr
