"""The cost of the daemon's relay, relative to a direct connection and to HAProxy.

python -m bench.relay [--version 18] [--clients 1,4,16,64] [--rounds 10] [--seconds 1]
                          [--scale 10] [--megabytes 200] [--only select,tpc-b,copy] [--keep DIR]

The loads are `pgbench -S` and TPC-B, both with `-M simple -j 1`, and COPY out (discarded) and in
(`WHERE false`, so that nothing is written). All connections lead to the same server, that of
`pgtemp --single`. That server has no TCP port; here a wrapper of the daemon gives it one, for
direct connections, and allows all clients. HAProxy runs in TCP mode, with the server's TCP port and
with its unix socket, which the daemon also uses. It runs with one thread and with its default
number of threads; the table has the better median, with the number of threads. Methods alternate in
short rounds, and medians count: transactions or megabytes a second.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import psycopg

from bench.report import Table, machine
from pgtemp.host import ports
from pgtemp.programs import search

_DAEMON = """
from dataclasses import replace
from pgtemp.sql import server_setup
plan = server_setup.plan
server_setup.plan = lambda options, *_: plan(replace(options, port=None), ("127.0.0.1",))
from pgtemp.cli.main import main
main()
"""
_HAPROXY = """
global
    maxconn 4000
    {threads}
defaults
    mode tcp
    maxconn 1000
    timeout connect 10s
    timeout client 1h
    timeout server 1h
listen tcp
    bind 127.0.0.1:{tcp}
    server pg 127.0.0.1:{port}
listen unix
    bind 127.0.0.1:{unix}
    server pg unix@{directory}/.s.PGSQL.{port}
"""
DIRECT, DAEMON = "direct", "pgtemp"
HAPROXY, HAPROXY_UNIX = "HAProxy, TCP", "HAProxy, unix"
PER_SECOND = "transactions per second"
_ROW = 8000  # bytes of a copied row
Ways = Mapping[str, int]  # port on 127.0.0.1, by name


@contextmanager
def served(version: str) -> Iterator[tuple[int, str, int]]:
    """The daemon's port, its server's socket directory, and the server's port."""
    port = ports.free_port("127.0.0.1")
    uri = f"postgresql://postgres@127.0.0.1:{port}/bench"
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as hba:
        hba.write("local all all trust\nhost all all all trust\n")
        hba.flush()
        Path(hba.name).chmod(0o644)
        command = [sys.executable, "-c", _DAEMON, "--pg-version", version, "--single"]
        command += ["-o", "max_connections=200", "--pg-hba-conf", hba.name, uri]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                while "Ctrl-C" not in (line := process.stdout.readline()):
                    if not line:
                        sys.exit("the daemon has not started")
                with psycopg.connect(uri) as connection:
                    row = connection.execute(
                        "SELECT current_setting('unix_socket_directories'), current_setting('port')"
                    ).fetchone()
                    assert row is not None
                yield port, row[0], int(row[1])
            finally:
                process.terminate()
                process.communicate()


@contextmanager
def haproxy(directory: str, port: int, threads: int | None) -> Iterator[tuple[int, int]]:
    """Its ports for the server's TCP port and for the server's socket."""
    tcp, unix = ports.free_port("127.0.0.1"), ports.free_port("127.0.0.1")
    with tempfile.TemporaryDirectory() as config_dir:
        conf = Path(config_dir, "haproxy.cfg")
        output = f"nbthread {threads}" if threads is not None else ""
        conf.write_text(
            _HAPROXY.format(threads=output, tcp=tcp, unix=unix, directory=directory, port=port)
        )
        with subprocess.Popen(["haproxy", "-db", "-q", "-f", str(conf)]) as process:
            try:
                for way in (tcp, unix):
                    _await_row(way, process)
                yield tcp, unix
            finally:
                process.terminate()


def _await_row(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(_uri(port)).close()
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _uri(port: int) -> str:
    return f"postgresql://postgres@127.0.0.1:{port}/bench"


def by_pgbench(program: str, arguments: Sequence[str], port: int) -> float:
    """Transactions a second, without the time in which the clients connect."""
    output = subprocess.run(
        [program, "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", *arguments, "bench"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    found = re.search(r"^tps = ([\d.]+)", output, re.M)
    return float(found[1]) if found is not None else 0.0


def copy_out(megabytes: int, port: int) -> float:
    rows = megabytes * 1_000_000 // _ROW
    with psycopg.connect(_uri(port)) as connection, connection.cursor() as cursor:
        start = time.perf_counter()
        query = f"COPY (SELECT repeat('x', {_ROW - 1}) FROM generate_series(1, {rows})) TO STDOUT"
        with cursor.copy(query) as copy:
            size = sum(len(data) for data in copy)
        return size / 1e6 / (time.perf_counter() - start)


def copy_in(megabytes: int, port: int) -> float:
    block = (b"x" * (_ROW - 1) + b"\n") * 125
    with psycopg.connect(_uri(port)) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TEMP TABLE t (line text)")
        start = time.perf_counter()
        with cursor.copy("COPY t FROM STDIN WHERE false") as copy:
            for _ in range(megabytes):
                copy.write(block)
        return megabytes / (time.perf_counter() - start)


def compare(
    title: str, ways: Ways, rounds: int, sample: Callable[[int], float]
) -> tuple[Table, dict[str, str]]:
    """Take samples of all methods in alternation, and print their rates.

    Returns:
        A table of the better variant of each method, and the names of these variants.
    """
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds):
        # The order alternates, so that no method always follows the same one.
        for way in list(ways) if turn % 2 == 0 else reversed(list(ways)):
            rates[way].append(sample(ways[way]))
    print(f"\n{title}")
    print(f"{'':24}{'median':>9}{'min':>9}{'max':>9}{'/direct':>9}{'/HAProxy':>9}{'/unix':>9}")
    best = {
        name: max((way for way in ways if way.startswith(name)), key=lambda w: _middle(rates[w]))
        for name in (DIRECT, HAPROXY, HAPROXY_UNIX, DAEMON)
    }
    table = Table(title, more_is_better=True)
    for way in best.values():
        for rate in rates[way]:
            table.add(way, rate)
        middle = _middle(rates[way])
        ratios = "".join(
            f"{middle / _middle(rates[best[base]]):9.2f}"
            for base in (DIRECT, HAPROXY, HAPROXY_UNIX)
        )
        print(f"{way:24}{middle:9.0f}{min(rates[way]):9.0f}{max(rates[way]):9.0f}{ratios}")
    sys.stdout.flush()
    return table, best


def _middle(samples: list[float]) -> float:
    return statistics.median(samples)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", default="18")
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=1)
    parser.add_argument("--scale", type=int, default=10)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--only", default="select,tpc-b,copy")
    parser.add_argument("--keep", type=Path, help="a directory for the samples, for docs/peers.py")
    given = parser.parse_args()
    if shutil.which("haproxy") is None:
        print("haproxy is not installed: apt-get install haproxy", file=sys.stderr)
        return 2
    programs = search.find(None, given.version)
    program = str(programs.program("pgbench"))
    loads = given.only.split(",")
    description = machine("bench.relay", programs.version)
    print(description)
    if given.keep is not None:
        given.keep.mkdir(parents=True, exist_ok=True)
    with ExitStack() as until_the_end:
        port, directory, server = until_the_end.enter_context(served(given.version))
        ways = {DIRECT: server}
        for threads in (1, None):
            tcp, unix = until_the_end.enter_context(haproxy(directory, server, threads))
            suffix = f", {threads or os.cpu_count()} thr."
            ways |= {HAPROXY + suffix: tcp, HAPROXY_UNIX + suffix: unix}
        ways[DAEMON] = port
        by_pgbench(program, ["-i", "-q", "-s", str(given.scale)], server)
        measured: list[tuple[str, str, str, Callable[[int], float]]] = []
        for name, kind in (("select", ["-S"]), ("tpc-b", [])):
            for clients in given.clients.split(",") if name in loads else ():
                load = [*kind, "-n", "-M", "simple", "-j", "1"]
                load += ["-c", clients, "-T", str(given.seconds)]
                number = f"{clients} client" if clients == "1" else f"{clients} clients"
                title = f"The relay, pgbench {kind[0] if kind else 'TPC-B'}, {number}: "
                sample = partial(by_pgbench, program, load)
                measured.append((f"{name}-{clients}", title + PER_SECOND, HAPROXY, sample))
        for way, copy in (("out", copy_out), ("in", copy_in)) if "copy" in loads else ():
            title = f"The relay, COPY {way}, {given.megabytes} MB: megabytes per second"
            measured.append((f"copy-{way}", title, DIRECT, partial(copy, given.megabytes)))
        for name, title, base, sample in measured:
            table, best = compare(title, ways, given.rounds, sample)
            if given.keep is not None:
                table.save(given.keep, f"relay-{name}", best[base], description)
    return 0


if __name__ == "__main__":
    sys.exit(main())
