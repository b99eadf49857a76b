"""However an owner exits, and whatever its servers are doing, nothing of them is left."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from owner import Owner, is_computing, is_running, segments_of
from pgtemp.host import locks
from pgtemp.programs.installation import Installation
from pgtemp.supervisor.crash import all_postgres, postgres_in
from pgtemp.supervisor.leftovers import LEASE
from project import Project
from support import Daemon, eventually, homes

START = """
db = PgTempDB().start()
report_server(db.data_dir)
"""


@pytest.fixture
def owners() -> Iterator[Callable[[str], Owner]]:
    """Starts owners; kills those that the test has not stopped."""
    started = []

    def start(script: str) -> Owner:
        started.append(Owner(script))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()


Owners = Callable[[str], Owner]


def leaves_nothing(owner: Owner) -> bool:
    return eventually(lambda: owner.leftovers() == [])


@pytest.mark.parametrize(
    "then",
    [
        "pass",
        "sys.exit(3)",
        "raise SystemExit",
        "os._exit(1)",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os.kill(os.getpid(), signal.SIGTERM)",
        "os.abort()",
        "import faulthandler; faulthandler._sigsegv()",
    ],
)
def test_nothing_outlives_its_owner(owners: Owners, then: str) -> None:
    """However a process exits, its server and its run directory are removed."""
    owner = owners(START + then)
    owner.end()
    assert leaves_nothing(owner)


FORK = """
if os.fork() == 0:
    report("child")
    sys.stdin.read()
    os._exit(0)
"""
MULTIPROCESSING = """
import multiprocessing
inherited = os.dup(0)
def work():
    report("child")
    os.read(inherited, 1)
multiprocessing.get_context("fork").Process(target=work).start()
"""


@pytest.mark.parametrize("then", ["os.kill(os.getpid(), 9)", "os.execv('/bin/true', ['true'])"])
@pytest.mark.parametrize("fork", [FORK, MULTIPROCESSING], ids=["fork", "multiprocessing"])
def test_a_surviving_forked_child_does_not_hold_the_server(
    owners: Owners, then: str, fork: str
) -> None:
    """The child has copies of its parent's descriptors, and outlives it."""
    owner = owners(START + fork + then)
    owner.wait_for("child")
    owner.process.wait(timeout=60)
    assert leaves_nothing(owner)
    owner.end()


IDLE = "connection = db.connect()\nconnection.execute('SELECT 1')\n"
BUSY = "db.connect().execute('DO $$ BEGIN LOOP END LOOP; END $$')\n"


@pytest.mark.parametrize("work", [IDLE, BUSY], ids=["idle", "busy"])
def test_a_killed_owner_with_a_client(owners: Owners, work: str) -> None:
    """The owner gets SIGKILL while its client is idle, or in a loop that handles no interrupt."""
    owner = owners(START + "report('begins')\n" + work + "report('idle')\nsys.stdin.read()")
    owner.wait_for("begins")
    (server,) = owner.servers
    if work is IDLE:
        owner.wait_for("idle")
    else:
        assert eventually(lambda: any(map(is_computing, postgres_in(str(server.data_dir)))))
    owner.kill()
    assert leaves_nothing(owner)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("where", ["begin", "first", "rest", "warm"])
def test_an_owner_killed_while_starting_leaves_nothing(
    where: str, keep: bool, open_dir: Path
) -> None:
    """At every step of a start, no incomplete run directory stays, persisted or not."""
    script = (
        "import os\n"
        "from pgtemp import PgTempDB\n"
        "from pgtemp.images import image\n"
        "with PgTempDB(): pass\n"
        f"whole = image.Image.{where}\n"
        "def die(self, target):\n"
        f"    if {where!r} != 'begin': whole(self, target)\n"
        "    os.kill(os.getpid(), 9)\n"
        f"image.Image.{where} = die\n"
        f"PgTempDB(data_dir_prefix={str(open_dir)!r}, persist={keep}).start()\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert eventually(lambda: list(open_dir.iterdir()) == [])


def test_an_owner_killed_during_initdb(open_dir: Path, programs: Installation) -> None:
    """At the first start, initdb is stopped and its files removed; only then is its lock free."""
    script = f"from pgtemp import PgTempDB\nPgTempDB(bin_dir={str(programs.bin_dir)!r}).start()"
    env = {**os.environ, "PGTEMP_CACHE_DIR": str(open_dir / "cache")}
    owner = subprocess.Popen([sys.executable, "-c", script], env=env)
    images = open_dir / "cache" / "images"

    def at_work() -> list[int]:
        return [pid for pid, cwd in all_postgres() if cwd.startswith(str(images))]

    assert eventually(lambda: bool(at_work()), 60)
    found = at_work()
    for pid in found:  # so that initdb does not exit before its owner
        os.kill(pid, signal.SIGSTOP)
    owner.kill()
    owner.wait()
    for pid in found:
        os.kill(pid, signal.SIGCONT)
    (lock,) = images.glob("*.lock")
    with locks.locked(lock):
        assert list(images.iterdir()) == [lock]
    assert not [pid for pid in found if is_running(pid)]
    assert not at_work()


def test_ctrl_c_during_initdb(open_dir: Path, programs: Installation) -> None:
    """initdb cleans up, including shared memory; only the lock file stays."""
    script = f"from pgtemp import PgTempDB\nPgTempDB(bin_dir={str(programs.bin_dir)!r}).start()"
    env = {**os.environ, "PGTEMP_CACHE_DIR": str(open_dir / "cache")}
    owner = subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.DEVNULL)
    images = open_dir / "cache" / "images"
    found: list[int] = []

    def at_work() -> bool:
        found[:] = [pid for pid, cwd in all_postgres() if cwd.startswith(str(images))]
        return bool(found)

    assert eventually(at_work, 60)
    owner.send_signal(signal.SIGINT)
    assert owner.wait(60) == -signal.SIGINT
    assert eventually(lambda: not any(map(is_running, found)))
    assert eventually(lambda: not any(segments_of(pid) for pid in found))
    assert [path.suffix for path in images.iterdir()] == [".lock"]


def test_an_owner_killed_while_an_image_is_cached(open_dir: Path) -> None:
    """The template has been built and is being copied to the cache."""
    script = """
import os
from pgtemp import Cluster
from pgtemp.images import publish
def build(uri): pass
with Cluster() as cluster:
    cluster.database()
    publish.copy = lambda *args: os.kill(os.getpid(), 9)
    cluster.template("app", build, key="1")
"""
    env = {**os.environ, "PGTEMP_CACHE_DIR": str(open_dir / "cache")}
    assert subprocess.run([sys.executable, "-c", script], env=env, check=False).returncode == -9
    images = open_dir / "cache" / "images"
    assert eventually(lambda: not list(images.glob("*.building*")))
    assert len(list(images.glob("*/manifest.json"))) == 1


def test_an_owner_killed_while_a_template_command_runs(owners: Owners, tmp_path: Path) -> None:
    """Background processes of the command are stopped, too."""
    pids = tmp_path / "pids"
    owner = owners(
        f"""
        with Cluster() as cluster:
            cluster.template("app", "cmd:(sleep 600 & echo $! $$; wait) > {pids}")
        """
    )
    assert eventually(lambda: pids.exists() and len(pids.read_text().split()) == 2, 60)
    owner.kill()
    commands = [int(pid) for pid in pids.read_text().split()]
    assert eventually(lambda: not any(is_running(pid) for pid in commands))


CLUSTER = """
def build(uri):
    with psycopg.connect(uri, autocommit=True) as connection:
        rows = "SELECT n, repeat('x', 900) FROM generate_series(1, 30000) n"
        connection.execute(f"CREATE TABLE big AS {rows}")
cluster = Cluster().start()
template = cluster.template("big", build)
connection = template.database().connect()
report_server(Path(connection.execute("SHOW data_directory").fetchone()[0]))
"""
CLONING = (
    CLUSTER
    + """
report("clones")
while True:
    template.database().close()
"""
)


@pytest.mark.parametrize(
    "moment", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 4))]
)
def test_an_owner_killed_while_cloning(owners: Owners, moment: int) -> None:
    """The owner is killed during a CREATE DATABASE that copies files."""
    owner = owners(CLONING)
    owner.wait_for("clones")
    (server,) = owner.servers
    base = server.data_dir / "base"
    for _ in range(moment + 1):  # the next clone starts
        before = set(os.listdir(base))
        assert eventually(lambda before=before: bool(set(os.listdir(base)) - before))  # type: ignore[misc]
    owner.kill()
    assert leaves_nothing(owner)


@pytest.mark.parametrize("keep", [False, True])
def test_an_owner_killed_while_stopping(owners: Owners, keep: bool, open_dir: Path) -> None:
    """The owner is killed after it has requested the stop and before that is complete.

    Persisted data stays complete.
    """
    owner = owners(
        f"""
        db = PgTempDB(persist={keep}, data_dir_prefix={str(open_dir)!r}).start()
        report_server(db.data_dir)
        with db.connect() as connection:
            connection.execute("CREATE TABLE t AS SELECT n FROM generate_series(1, 100000) n")
        from pgtemp.supervisor.channel import Channel
        Channel._receive = lambda self, seconds: os.kill(os.getpid(), 9)
        db.stop()
        """
    )
    assert owner.end() == -signal.SIGKILL
    (server,) = owner.servers
    if not keep:
        assert leaves_nothing(owner)
        assert eventually(lambda: list(open_dir.iterdir()) == [])
        return
    run_dir = server.data_dir.parent
    assert eventually(lambda: server.leftovers() == [run_dir])
    assert eventually(lambda: not (run_dir / LEASE).exists())
    assert not (server.data_dir / "postmaster.pid").exists(), "it was not shut down cleanly"


def test_a_child_that_exits_does_not_stop_its_parents_server(owners: Owners) -> None:
    """`sys.exit` in a child runs destructors and atexit; the parent's server keeps running."""
    owner = owners(
        START
        + """
for end in (sys.exit, lambda: os._exit(0), lambda: db.stop(), lambda: os.kill(os.getpid(), 9)):
    if os.fork() == 0:
        end()
        sys.exit()
    os.wait()
    with db.connect() as connection:
        report("alive", connection.execute("SELECT 7").fetchone())
sys.stdin.readline()
"""
    )
    for _ in range(4):
        assert "(7,)" in owner.wait_for("alive")
    assert owner.end() == 0
    assert leaves_nothing(owner)


@pytest.mark.parametrize("daemonic", [False, True])
def test_a_server_outlives_the_thread_that_started_it(owners: Owners, daemonic: bool) -> None:
    """Its parent-death signal is not bound to that thread; the server stops with the process."""
    owner = owners(
        f"""
        started, begun = [], threading.Event()
        def work():
            started.append(PgTempDB().start())
            begun.set()
            if {daemonic}:
                report("waits")
                threading.Event().wait()  # until the process ends, which does not ask it
        thread = threading.Thread(target=work, daemon={daemonic})
        thread.start()
        thread.join(None if not {daemonic} else 0)
        begun.wait()
        (db,) = started
        report_server(db.data_dir)
        with db.connect() as connection:
            report("alive", connection.execute("SELECT 7").fetchone())
        sys.stdin.readline()
        """
    )
    assert "(7,)" in owner.wait_for("alive")
    assert owner.end() == 0
    assert leaves_nothing(owner)


def test_an_owner_that_exits_while_threads_start_servers(owners: Owners) -> None:
    """Daemonic threads are in the middle of a start when the process exits."""
    owner = owners(
        START
        + """
def work():
    while True:
        PgTempDB().start()
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
report("starts")
sys.stdin.readline()
"""
    )
    before = homes()
    owner.wait_for("starts")
    assert eventually(lambda: len(homes() - before) > 3)
    owner.end()
    assert leaves_nothing(owner)


@pytest.mark.slow
def test_ctrl_c_on_a_terminal(open_dir: Path) -> None:
    """It reaches only the owner.

    The database works in the KeyboardInterrupt handler, and is removed afterwards.
    """
    script = """
from pgtemp import PgTempDB
with PgTempDB(data_dir_prefix=%r) as db:
    connection = db.connect()
    try:
        print("waits", flush=True)
        connection.execute("SELECT pg_sleep(60)")
    except KeyboardInterrupt:
        with db.connect() as another:
            print("alive", another.execute("SELECT 7").fetchone(), flush=True)
        raise
"""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", script % str(open_dir)])
    output = _read_until(terminal, b"waits")
    os.write(terminal, b"\x03")
    output += _read_until(terminal, b"KeyboardInterrupt")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert b"(7,)" in output
    assert os.waitstatus_to_exitcode(status) == -signal.SIGINT
    assert eventually(lambda: list(open_dir.iterdir()) == [])


def _read_until(terminal: int, word: bytes) -> bytes:
    output = b""
    while word not in output:
        assert select.select([terminal], [], [], 60)[0], output.decode()
        try:
            output += os.read(terminal, 4096)
        except OSError:  # its other end is closed
            raise AssertionError(output.decode()) from None
    return output


@pytest.mark.slow
def test_a_killed_worker_of_xdist(project: Project) -> None:
    """One of four workers is killed in a test: its server is removed, and the other tests pass."""
    before = homes()
    project.plugins.append("xdist")
    result = project.run(
        "-n", "4", "--max-worker-restart=2",
        text="""
            import os, signal
            import pytest

            @pytest.mark.parametrize("n", range(24))
            def test_it(pgtemp, n):
                with pgtemp.connect() as connection:
                    assert connection.execute("SELECT count(*) FROM account").fetchone() == (0,)
                    if n == 9:
                        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )  # fmt: skip
    assert result.count("passed") == 23, result.output
    assert result.count("failed") == 1, result.output
    assert "crashed while running" in result.output
    assert eventually(lambda: homes() <= before)


def _busy_clients(served: Daemon) -> list[psycopg.Connection[tuple[object, ...]]]:
    """An idle client, one in a loop that handles no interrupt, and many new ones."""
    idle = psycopg.connect(served.uri)
    idle.execute("SELECT 1")
    busy = psycopg.connect(served.uri)
    busy.pgconn.send_query(b"DO $$ BEGIN LOOP END LOOP; END $$")
    new = [psycopg.connect(served.uri) for _ in range(12)]
    return [idle, busy, *new]


@pytest.mark.parametrize("isolation", ["database", "cluster"])
@pytest.mark.parametrize("first", [None, signal.SIGTERM])
def test_a_killed_daemon(daemon: type[Daemon], isolation: str, first: int | None) -> None:
    """It has idle, busy and new clients, and may already be stopping."""
    before = homes()
    served = daemon("--isolation", isolation)
    clients = _busy_clients(served)
    found = homes() - before
    if first is not None:
        served.process.send_signal(first)
    served.end(signal.SIGKILL)
    assert eventually(lambda: homes() <= before)
    assert not [cwd for _, cwd in all_postgres() if any(cwd.startswith(str(one)) for one in found)]
    for client in clients:
        client.close()


def test_a_stop_does_not_wait_for_a_busy_client(daemon: type[Daemon]) -> None:
    """A loop that handles no interrupt does not delay the daemon's exit."""
    before = homes()
    served = daemon()
    clients = _busy_clients(served)
    assert served.end(signal.SIGTERM) == (0, "")
    assert eventually(lambda: homes() <= before)
    for client in clients:
        client.close()


ALIVE = """
report("waits")
sys.stdin.readline()
report("alive", connection.execute("SELECT 7").fetchone())
"""


@pytest.mark.slow
def test_a_minute_in_a_debugger(owners: Owners, daemon: type[Daemon]) -> None:
    """The databases of owners that are stopped for a minute are unchanged."""
    alone = owners(START + IDLE + ALIVE)
    shared = owners(CLUSTER + ALIVE)
    alone.wait_for("waits")
    shared.wait_for("waits")
    served = daemon()
    with psycopg.connect(served.uri) as connection:
        connection.execute("CREATE TABLE t AS SELECT 7 AS n")
        connection.commit()
        stopped = [alone.process, shared.process, served.process]
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        assert not eventually(lambda: bool(alone.leftovers() == [] or shared.leftovers() == []), 60)
        for process in stopped:
            process.send_signal(signal.SIGCONT)
        assert connection.execute("SELECT n FROM t").fetchone() == (7,)
    for owner in (alone, shared):
        owner.send("go")
        assert "(7,)" in owner.wait_for("alive")
        assert owner.end() == 0
        assert leaves_nothing(owner)
