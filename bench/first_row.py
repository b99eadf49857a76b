"""The time from nothing to the first row of a new server: pgtemp, its peers, and the lower bound.

python -m bench.first_row [--version 15] [--rounds 12]

Each round runs every method once, in its own process, after an unmeasured first round that fills
the caches. Data is on tmpfs. Times are milliseconds: median, minimum, maximum.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import psycopg

from bench.report import Table
from pgtemp import PgTempDB
from pgtemp.host import disk_space, identity, paths, processes
from pgtemp.images import cache
from pgtemp.programs import search
from pgtemp.server import config

SHM = Path("/dev/shm")
TARGET = 6.0  # times faster than initdb + pg_ctl, and than testing.postgresql
OPTIONS = "-c listen_addresses= -c fsync=off -c unix_socket_directories="


def first_row(**how: object) -> None:
    with psycopg.connect(**how) as connection:  # type: ignore[arg-type]
        connection.execute("SELECT 1").fetchone()


def pgtemp_handle(version: str) -> float:
    start = time.perf_counter()
    db = PgTempDB(version=version).start()
    first_row(conninfo=db.uri)
    elapsed = time.perf_counter() - start
    db.stop()
    return elapsed


def pgtemp_first(version: str) -> float:
    """The first handle of a process, which also starts the supervisor."""
    return pgtemp_handle(version)


def pgtemp_later(version: str) -> float:
    """The second handle of a process."""
    pgtemp_handle(version)
    return pgtemp_handle(version)


def pgtemp_in_300_mb(version: str) -> float:
    """The second handle of a process that has 300 MB in memory."""
    ballast = bytearray(os.urandom(1 << 20)) * 300
    elapsed = pgtemp_later(version)
    del ballast
    return elapsed


def initdb_and_pg_ctl(version: str) -> float:
    """The commands of a shell script."""
    programs = search.find(None, version).within_reach(identity.choose(None))
    directory = become_server_user()
    environment = processes.clean_environment()
    start = time.perf_counter()
    run = [
        programs.program("initdb"),
        "-N",
        "-A",
        "trust",
        "-U",
        "postgres",
        "-D",
        directory / "data",
    ]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL, env=environment)
    ctl = [programs.program("pg_ctl"), "-D", directory / "data"]
    begin = [*ctl, "-w", "-l", directory / "log", "-o", f"{OPTIONS}{directory}", "start"]
    subprocess.run(begin, check=True, stdout=subprocess.DEVNULL, env=environment)
    first_row(host=str(directory), user="postgres", dbname="postgres")
    elapsed = time.perf_counter() - start
    subprocess.run([*ctl, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(directory)
    return elapsed


def testing_postgresql(version: str) -> float:
    """The second server of its factory, with the cache enabled."""
    import testing.postgresql

    programs = search.find(None, version).within_reach(identity.choose(None))
    tempfile.tempdir = str(become_server_user())
    factory = testing.postgresql.PostgresqlFactory(
        cache_initialized_db=True,
        initdb=str(programs.program("initdb")),
        postgres=str(programs.program("postgres")),
    )
    factory().stop()
    start = time.perf_counter()
    server = factory()
    first_row(**{"dbname" if k == "database" else k: v for k, v in server.dsn().items()})
    elapsed = time.perf_counter() - start
    server.stop()
    factory.clear_cache()
    shutil.rmtree(tempfile.tempdir, ignore_errors=True)
    return elapsed


def overlay_lower_bound(version: str) -> float:
    """The fastest known method: an overlay mount, no password and no supervisor."""
    owner = identity.choose(None)
    programs = search.find(None, version).within_reach(owner)
    lower = cache.Cached(programs, {}, owner).resolve().path / "data"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 0x44000, None):
        raise OSError(ctypes.get_errno(), "no mount namespace")
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=SHM))
    for name in ("upper", "work", "data", "lower"):
        (directory / name).mkdir(mode=0o700)
    shutil.copytree(lower, directory / "lower", dirs_exist_ok=True)
    text = config.postgresql_conf(
        (directory / "lower/postgresql.conf").read_text(),
        major=programs.major, given="", settings={}, existing_first=True,
        disk=disk_space.size_bytes(SHM),
    )  # fmt: skip
    (directory / "lower/postgresql.conf").write_text(text)
    for path in [directory, *directory.rglob("*")]:
        os.chown(path, owner.uid, owner.gid)
    options = (
        f"lowerdir={directory}/lower,upperdir={directory}/upper,workdir={directory}/work".encode()
    )
    start = time.perf_counter()
    if libc.mount(b"overlay", str(directory / "data").encode(), b"overlay", 0, options):
        raise OSError(ctypes.get_errno(), "no overlay mount")
    argv = [str(programs.program("postgres")), "-D", str(directory / "data")]
    argv += ["-c", "listen_addresses=", "-c", f"unix_socket_directories={directory}"]
    server = subprocess.Popen(
        argv, env=processes.clean_environment(), user=owner.uid, group=owner.gid,
        extra_groups=[], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    status = directory / "data/postmaster.pid"
    while not status.exists() or "ready" not in status.read_text():
        time.sleep(0.0005)
    first_row(host=str(directory), user="postgres", dbname="postgres")
    elapsed = time.perf_counter() - start
    server.send_signal(3)
    server.wait()
    libc.umount(str(directory / "data").encode())
    shutil.rmtree(directory)
    return elapsed


def become_server_user() -> Path:
    """A directory on tmpfs. As root, also become the server user."""
    owner = identity.choose(None)
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=SHM))
    os.chown(directory, owner.uid, owner.gid)
    if owner.switch:
        os.environ["HOME"] = str(directory)
        os.environ["USER"] = pwd.getpwuid(owner.uid).pw_name
        os.setgroups([])
        os.setgid(owner.gid)
        os.setuid(owner.uid)
    os.chdir(directory)
    return directory


METHODS: dict[str, Callable[[str], float]] = {
    "pgtemp, first handle of a process": pgtemp_first,
    "pgtemp, later handles": pgtemp_later,
    "pgtemp, later, process of 300 MB": pgtemp_in_300_mb,
    "overlay, the lower bound (needs root)": overlay_lower_bound,
    "initdb + pg_ctl start": initdb_and_pg_ctl,
    "testing.postgresql with its cache": testing_postgresql,
}


def measure(method: str, version: str) -> float | str:
    """Run one method once, in its own process, so that no method warms up another."""
    context = get_context("fork")
    answers: SimpleQueue[float | str] = context.SimpleQueue()

    def work() -> None:
        try:
            answers.put(METHODS[method](version) * 1000)
        except BaseException as error:
            answers.put(f"{type(error).__name__}: {error}")

    process = context.Process(target=work)
    process.start()
    answer = answers.get()
    process.join()
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--version", action="append", help="of PostgreSQL; 15 and 18 by default")
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.release()}, "
        f"{paths.filesystem_type(SHM)}, {given.rounds} rounds"
    )
    for version in given.version or ["15", "18"]:
        table = Table(f"PostgreSQL {search.find(None, version).version}")
        for turn in range(given.rounds + 1):
            for method in METHODS:
                result = measure(method, version)
                if turn:
                    table.add(method, result)
        table.show(base="pgtemp, later handles")


if __name__ == "__main__":
    sys.exit(main())
