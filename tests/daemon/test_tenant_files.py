"""A tenant runs programs as the server user; no file that it plants makes root act for it.

The owner is root here, and the servers run as another user. A tenant can do what these tests do
with COPY FROM PROGRAM, which runs programs in the data directory.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from pgtemp import ClusterError, OptionError, PgTempDB, TransferError
from pgtemp.host import identity
from pgtemp.sql import dump_restore
from pgtemp.uri import ConnectionInfo
from rawclient import unused_port
from support import OTHER_UID, Daemon, acting_as, eventually

DaemonType = type[Daemon]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the owner is root")
SECRET = "only root may read this"


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Path]:
    """A file of root, which must not change."""
    path = tmp_path / "secret"
    path.write_text(SECRET)
    path.chmod(0o600)
    before = path.stat()
    yield path
    after = path.stat()
    assert path.read_text() == SECRET
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, 0, before.st_mode)


def program(connection: psycopg.Connection[object], command: str) -> list[str]:
    """Run a shell command as the server user and return its output."""
    connection.execute("CREATE TEMP TABLE IF NOT EXISTS output (line text)")
    connection.execute("TRUNCATE output")
    quoted = f"{command}; true".replace("'", "''")
    connection.execute(f"COPY output FROM PROGRAM '{quoted}'".encode())
    return [str(line) for (line,) in connection.execute("SELECT line FROM output").fetchall()]  # type: ignore[misc]


# Shell commands with which a tenant plants files in the data directory of a template it edits.
PLANTED = {
    "in the run directory": "ln -s {target} ../warm.building; mkdir ../warm",
    "relation cache": "rm -f base/5/pg_internal.init; ln -s {target} base/5/pg_internal.init",
    "configuration": "rm -f postgresql.conf; ln -s {target} postgresql.conf",
    "configuration pipe": "rm -f postgresql.conf; mkfifo postgresql.conf",
    "a link": "ln -s {target} base/5/link",
    "a pipe": "mkfifo global/pipe",
    "a directory link": "mv pg_stat pg_stat.old; ln -s {folder} pg_stat",
    "a map": "ln -s {target} base/5/1_fsm; ln -s {target} base/5/2_vm",
    "spare WAL": "ln -s {target} pg_wal/0000000100000000000000FF",
    "a large file": "truncate -s 1T base/5/pg_internal.init",
}


@pytest.mark.parametrize("planted", PLANTED)
def test_files_planted_in_a_template(
    daemon: DaemonType, open_dir: Path, secret: Path, planted: str
) -> None:
    """Root neither reads nor writes the target of a link; other clients are still served."""
    served = daemon("--pool", "1")
    victims = open_dir / "victims"
    victims.mkdir()
    (victims / "pg_internal.init").symlink_to(secret)
    with psycopg.connect(served.uri + "~template", autocommit=True) as edit:
        edit.execute("CREATE TABLE marked (n int)")
        program(edit, PLANTED[planted].format(target=secret, folder=victims))
    with psycopg.connect(served.uri, autocommit=True) as client:
        assert client.execute("SELECT 1").fetchone() == (1,)
        found = program(client, f"grep -rlF '{SECRET}' . 2>/dev/null")
        assert found == []
    assert sorted(path.name for path in victims.iterdir()) == ["pg_internal.init"]
    status, errors = served.end()
    assert status == 0 and "Traceback" not in errors


def test_a_template_with_a_link_is_refused(daemon: DaemonType, secret: Path) -> None:
    """The error names the link, and the template stays unchanged."""
    served = daemon("--pool", "1", "--log-level", "info")
    with psycopg.connect(served.uri + "~template", autocommit=True) as edit:
        edit.execute("CREATE TABLE marked (n int)")
        program(edit, f"ln -s {secret} base/5/link")
    with psycopg.connect(served.uri, autocommit=True) as client:
        assert client.execute("SELECT to_regclass('marked')").fetchone() == (None,)
    _, errors = served.end()
    assert "base/5/link is a symbolic link" in errors


def test_a_socket_replaced_by_a_link(daemon: DaemonType, tmp_path: Path) -> None:
    """Root sends nothing to another user's socket if a link to it replaces the server's socket.

    Otherwise a client of the session could reach any local service with root's rights.
    """
    served = daemon("--isolation", "cluster", "--pool", "1")
    with socket.socket(socket.AF_UNIX) as service:
        service.bind(str(tmp_path / "service"))
        os.chmod(tmp_path / "service", 0o666)
        for above in (tmp_path, *tmp_path.parents[:3]):
            above.chmod(above.stat().st_mode | 0o011)
        service.listen()
        service.settimeout(0)
        uri = served.uri + "~mine"
        with psycopg.connect(uri, autocommit=True) as tenant:
            (port,) = tenant.execute("SHOW port").fetchone() or ("",)
            name = f"../socket/.s.PGSQL.{port}"
            program(tenant, f"mv {name} ../socket/old; ln -s {tmp_path}/service {name}")
            # The session gets another server.
            with psycopg.connect(uri, connect_timeout=30) as again:
                assert again.execute("SELECT 1").fetchone() == (1,)
            received = []
            while True:
                try:
                    connected, _ = service.accept()
                except BlockingIOError:
                    break
                with connected:
                    connected.settimeout(5)
                    received.append(connected.recv(100))
        assert set(received) <= {b""}
    assert served.end()[0] == 0


_ATTACK = """
import os, sys, time
target, uid, gid, base = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
os.setgroups([]); os.setgid(gid); os.setuid(uid)
known, tried = set(os.listdir(base)), 0
print("ready", flush=True)
while os.getppid() != 1:
    for name in set(os.listdir(base)) - known:
        if not name.startswith("pgtemp-"):
            continue
        inner = [f"data/{part}" for part in ("pg_wal", "pg_notify", "pg_stat", "base", "global")]
        for part in (*inner, "data", "socket", "recycled"):
            path = f"{base}/{name}/{part}"
            try:
                os.rmdir(path)
                os.symlink(target, path)
                tried += 1
            except OSError:
                pass
"""


@pytest.mark.slow
def test_directories_replaced_while_a_server_starts(secret: Path, open_dir: Path) -> None:
    """A process of the server user that replaces each new directory by a link gains nothing."""
    user = identity.choose(None)
    argv = [sys.executable, "-c", _ATTACK, str(secret), str(user.uid), str(user.gid), str(open_dir)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as attacker:
        assert attacker.stdout is not None
        assert attacker.stdout.readline() == "ready\n"
        for _ in range(40):
            try:
                with PgTempDB(data_dir_prefix=open_dir):
                    pass
            except ClusterError:
                pass  # the attacker may break its own user's servers
        attacker.kill()


def test_a_data_directory_with_links_is_not_copied(open_dir: Path, secret: Path) -> None:
    """For copy_from of another user's directory, the error names the link and no server starts."""
    with PgTempDB(persist=True, data_dir_prefix=open_dir) as db:
        pass
    for planted in ("base/5/planted", "pg_wal/planted", "planted"):
        link = db.data_dir / planted
        link.symlink_to(secret)
        with (
            pytest.raises(ClusterError, match=f"{planted} is a symbolic link"),
            PgTempDB(copy_from=db.data_dir),
        ):
            pass
        link.unlink()


def test_a_hard_link_to_a_file_of_root_is_not_copied(open_dir: Path) -> None:
    with PgTempDB(persist=True, data_dir_prefix=open_dir) as db:
        pass
    hidden = open_dir / "of-root"
    hidden.write_text(SECRET)
    hidden.chmod(0o600)
    os.link(hidden, db.data_dir / "planted")
    with (
        pytest.raises(ClusterError, match="planted belongs to uid 0"),
        PgTempDB(copy_from=db.data_dir),
    ):
        pass
    assert hidden.stat().st_uid == 0


def test_persisted_data_of_another_user_is_not_opened_as_root(open_dir: Path) -> None:
    """`pgtemp open` gives up root's rights first, or reports why it cannot."""
    with PgTempDB(persist=True, data_dir_prefix=open_dir) as db:
        pass
    directory = db.data_dir.parent
    subprocess.run(["chown", "-Rh", f"{db_user().uid}", directory], check=True)
    argv = [sys.executable, "-m", "pgtemp", "open", str(directory)]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as opened:
        assert opened.stdout is not None and opened.stderr is not None
        first = opened.stdout.readline()
        if db_user().blocked_at(Path(sys.executable).resolve()) is not None:
            assert opened.wait(30) == 2
            assert "cannot enter" in opened.stderr.read()
            return
        assert str(directory) in first
        status = Path(f"/proc/{opened.pid}/status").read_text()
        assert re.search(rf"^Uid:\t{db_user().uid}\t", status, re.M)
        opened.terminate()
        assert opened.wait(30) == 0
    assert (directory / "data" / "PG_VERSION").exists()


def db_user() -> identity.Identity:
    return identity.choose(None)


@pytest.mark.parametrize("planted", ["link", "pipe"])
def test_a_dump_into_a_shared_directory(open_dir: Path, secret: Path, planted: str) -> None:
    """A file of another user at the dump's name is not written; the error names the reason."""
    path = open_dir / "dump.sql"
    with acting_as(OTHER_UID):
        if planted == "link":
            path.symlink_to(secret)
        else:
            os.mkfifo(path)
    with PgTempDB() as db:
        to = ConnectionInfo(host=str(db.socket_dir), port=db.port, user=db.user, dbname=db.dbname)
        with pytest.raises(TransferError, match=r"is a link of another user|is not a regular file"):
            dump_restore.dump(db.installation, to, path)
    assert [name for name in os.listdir(open_dir) if name != "dump.sql"] == []


@pytest.mark.parametrize("planted", ["link", "pipe", "file"])
def test_a_log_in_a_shared_directory(open_dir: Path, secret: Path, planted: str) -> None:
    """A file of another user at the log's name is not written; the error names the reason."""
    path = open_dir / "server.log"
    with acting_as(OTHER_UID):
        if planted == "link":
            path.symlink_to(secret)
        elif planted == "pipe":
            os.mkfifo(path)
        else:
            path.write_text("")
    with (
        pytest.raises(OptionError, match=r"cannot write to .*server\.log"),
        PgTempDB(log_path=path),
    ):
        pass
    assert planted != "file" or path.read_text() == ""


_WATCH = textwrap.dedent(
    r"""
    import os, re, sys
    _theirs = re.compile(r"/pgtemp-\w{8}(\.gone)?/(data|socket|recycled)/.")
    def _watch(event, arguments):
        if event in _EVENTS and os.geteuid() == 0:
            for path in arguments[:2]:
                if not isinstance(path, (str, bytes, os.PathLike)):
                    continue
                if _theirs.search(os.fsdecode(path)):
                    os.write(2, f"BY PATH: {event} {os.fsdecode(path)}\n".encode())
    _EVENTS = {"open", *(f"os.{name}" for name in (
        "chmod", "chown", "link", "listdir", "mkdir", "remove", "rename", "rmdir", "scandir",
        "symlink", "truncate", "utime", "chdir", "getxattr", "setxattr"))}
    sys.addaudithook(_watch)
    """
)
_LIBRARY = """
from pathlib import Path
from pgtemp import Cluster, PgTempDB, Recipe
place = Path(sys.argv[1])
with PgTempDB(persist=True, data_dir_prefix=place, dump=place / "dump.sql") as db:
    db.connect().close()
    db.check()
with PgTempDB(copy_from=db.data_dir, load=place / "dump.sql"):
    pass
def build(uri): pass
with Cluster() as cluster:
    for recipe in (build, Recipe(build=[place / "dump.sql"])):
        template = cluster.template(f"of_{type(recipe).__name__}", recipe)
        for _ in range(10):
            with template.database() as one:
                one.connect().close()
                one.restore(one.snapshot("s"))
print("done")
"""
_DAEMON = """
from pgtemp.cli.main import main
sys.argv = ["pgtemp", *sys.argv[1:]]
main()
"""


def watched(tmp_path: Path, script: str) -> list[str]:
    path = tmp_path / "watched.py"
    path.write_text(_WATCH + script)
    return [sys.executable, str(path)]


def test_the_library_uses_descriptors(tmp_path: Path, open_dir: Path) -> None:
    """Root opens, lists, makes and removes nothing by a path that the server user can change."""
    argv = [*watched(tmp_path, _LIBRARY), str(open_dir)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
    assert "BY PATH" not in done.stderr, done.stderr


@pytest.mark.parametrize("isolation", ["database", "cluster"])
def test_the_daemon_uses_descriptors(tmp_path: Path, isolation: str) -> None:
    """The same for the daemon: leases, recycled databases, sessions, an edited template."""
    uri = f"postgresql://postgres@127.0.0.1:{unused_port()}/test"
    argv = [*watched(tmp_path, _DAEMON), "serve", uri, "--isolation", isolation]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as run, killed_at_the_end(run):
        assert eventually(lambda: serves(uri), 60)
        for name in ("", "~session", "~template", *[""] * 8):
            with psycopg.connect(uri + name) as connection:
                connection.execute("CREATE TABLE IF NOT EXISTS t (n int)")
                connection.commit()
        run.terminate()
        _, errors = run.communicate(timeout=30)
    assert run.returncode == 0
    assert "BY PATH" not in errors, errors


@contextmanager
def killed_at_the_end(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kill a process that a failed block leaves running."""
    try:
        yield
    finally:
        process.kill()


def serves(uri: str) -> bool:
    try:
        psycopg.connect(uri).close()
    except psycopg.OperationalError:
        return False
    return True
