"""From nothing to the first row of a new server: pgtemp, its peers, and the floor.

    python -m bench.first_row [--version 15] [--rounds 12]

Each round runs every way once, in its own process, after an unmeasured first round that fills the
caches. Data is on tmpfs. Times are milliseconds: median, minimum, maximum.
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
from pgtemp.host import identity, paths, processes
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
    """The first handle of a process: starts the warden too."""
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
    """What a shell script does."""
    programs = search.find(None, version).within_reach(identity.choose(None))
    home = become_ordinary()
    environment = processes.clean_environment()
    start = time.perf_counter()
    run = [programs.program("initdb"), "-N", "-A", "trust", "-U", "postgres", "-D", home / "data"]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL, env=environment)
    ctl = [programs.program("pg_ctl"), "-D", home / "data"]
    begin = [*ctl, "-w", "-l", home / "log", "-o", f"{OPTIONS}{home}", "start"]
    subprocess.run(begin, check=True, stdout=subprocess.DEVNULL, env=environment)
    first_row(host=str(home), user="postgres", dbname="postgres")
    elapsed = time.perf_counter() - start
    subprocess.run([*ctl, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(home)
    return elapsed


def testing_postgresql(version: str) -> float:
    """Its factory with the cache on, the second server of it."""
    import testing.postgresql

    programs = search.find(None, version).within_reach(identity.choose(None))
    tempfile.tempdir = str(become_ordinary())
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


def overlay_floor(version: str) -> float:
    """The best way PERFORMANCE.md knows: an overlay mount, trust, no password, no warden."""
    owner = identity.choose(None)
    programs = search.find(None, version).within_reach(owner)
    lower = cache.Cached(programs, {}, owner).resolve().path / "data"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 0x44000, None):
        raise OSError(ctypes.get_errno(), "no mount namespace")
    home = Path(tempfile.mkdtemp(prefix="bench-", dir=SHM))
    for name in ("upper", "work", "data", "lower"):
        (home / name).mkdir(mode=0o700)
    shutil.copytree(lower, home / "lower", dirs_exist_ok=True)
    text = config.postgresql_conf(
        (home / "lower/postgresql.conf").read_text(),
        major=programs.major, given="", settings={}, existing_first=True,
    )  # fmt: skip
    (home / "lower/postgresql.conf").write_text(text)
    for path in [home, *home.rglob("*")]:
        os.chown(path, owner.uid, owner.gid)
    options = f"lowerdir={home}/lower,upperdir={home}/upper,workdir={home}/work".encode()
    start = time.perf_counter()
    if libc.mount(b"overlay", str(home / "data").encode(), b"overlay", 0, options):
        raise OSError(ctypes.get_errno(), "no overlay mount")
    argv = [str(programs.program("postgres")), "-D", str(home / "data")]
    argv += ["-c", "listen_addresses=", "-c", f"unix_socket_directories={home}"]
    server = subprocess.Popen(
        argv, env=processes.clean_environment(), user=owner.uid, group=owner.gid,
        extra_groups=[], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    status = home / "data/postmaster.pid"
    while not status.exists() or "ready" not in status.read_text():
        time.sleep(0.0005)
    first_row(host=str(home), user="postgres", dbname="postgres")
    elapsed = time.perf_counter() - start
    server.send_signal(3)
    server.wait()
    libc.umount(str(home / "data").encode())
    shutil.rmtree(home)
    return elapsed


def become_ordinary() -> Path:
    """A directory on tmpfs; as root, also become the user PostgreSQL is run as."""
    owner = identity.choose(None)
    home = Path(tempfile.mkdtemp(prefix="bench-", dir=SHM))
    os.chown(home, owner.uid, owner.gid)
    if owner.switch:
        os.environ["HOME"] = str(home)
        os.environ["USER"] = pwd.getpwuid(owner.uid).pw_name
        os.setgroups([])
        os.setgid(owner.gid)
        os.setuid(owner.uid)
    os.chdir(home)
    return home


WAYS: dict[str, Callable[[str], float]] = {
    "pgtemp, first handle of a process": pgtemp_first,
    "pgtemp, later handles": pgtemp_later,
    "pgtemp, later, process of 300 MB": pgtemp_in_300_mb,
    "overlay floor (needs root)": overlay_floor,
    "initdb + pg_ctl start": initdb_and_pg_ctl,
    "testing.postgresql with its cache": testing_postgresql,
}


def measure(way: str, version: str) -> float | str:
    """One way once, in a process of its own, so that none warms another up."""
    context = get_context("fork")
    answers: SimpleQueue[float | str] = context.SimpleQueue()

    def work() -> None:
        try:
            answers.put(WAYS[way](version) * 1000)
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
            for way in WAYS:
                result = measure(way, version)
                if turn:
                    table.add(way, result)
        table.show(base="pgtemp, later handles")


if __name__ == "__main__":
    sys.exit(main())
