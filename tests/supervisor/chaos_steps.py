"""The steps of a storm's clients: functions of the storm and of one line of its plan."""

from __future__ import annotations

import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pgtemp.wire.messages import SSL_CODE, TERMINATE, frame, startup_message, untyped
from pgtemp.wire.tls import NO_TLS
from rawclient import (
    CANCELED,
    SECONDS,
    Client,
    GoneError,
    HangError,
    SqlError,
    ViolationError,
    cancel,
    dial,
    error_fields,
    read_to_the_end,
    reset,
)  # fmt: skip

if TYPE_CHECKING:
    from chaos import Storm

WORDS = ("red", "green", "blue")
IDLE_SECONDS = 5.0  # for which a lease may be idle
_CUT_OFF_SECONDS = 0.3
_pause = threading.Event().wait  # of a client that does something else in the meantime


@dataclass(frozen=True)
class Step:
    """One line of a plan; `dice` is the seed of all its random choices."""

    client: int
    number: int
    name: str
    dice: int

    @property
    def token(self) -> str:
        """The mark that this step's lease puts on everything it creates."""
        return f"chaos_{self.client}_{self.number}"

    def random(self) -> random.Random:
        return random.Random(self.dice)

    def __str__(self) -> str:
        return f"client {self.client}, step {self.number}: {self.name} {self.dice}"


StepFunction = Callable[["Storm", Step], None]
STEPS: dict[str, tuple[int, StepFunction]] = {}


def step(weight: int) -> Callable[[StepFunction], StepFunction]:
    """Register a function as a step; the weight decides how often it is chosen."""

    def add(function: StepFunction) -> StepFunction:
        STEPS[function.__name__] = weight, function
        return function

    return add


@contextmanager
def _private(storm: Storm, it: Step) -> Iterator[Client]:
    """A lease of its own, inspected and marked; ends as the block has left it."""
    client = storm.connect(it)
    try:
        storm.inspect(client, it.token)
        client.query(f"INSERT INTO marks VALUES ('{it.token}', '{it.token}')")
        yield client
    finally:
        client.socket.close()
        storm.left(it.token, politely=False)


def _leave(storm: Storm, it: Step, client: Client) -> None:
    """Check that no other lease's rows are visible, then disconnect in one of two ways."""
    storm.inspect(client, it.token)
    if it.random().random() < 0.7:
        client.close()
        storm.left(it.token, politely=True)
    else:
        client.reset()


@step(30)
def work(storm: Storm, it: Step) -> None:
    """Write, read, and disconnect."""
    dice = it.random()
    with _private(storm, it) as client:
        for _ in range(dice.randrange(4)):
            client.query(f"INSERT INTO marks VALUES ('{it.token}', 'more')")
            client.query("BEGIN; CREATE TABLE t AS SELECT * FROM marks; DROP TABLE t; COMMIT")
        _leave(storm, it, client)


@step(6)
def log_in_and_leave(storm: Storm, it: Step) -> None:
    """Log in, and disconnect without a statement."""
    client = storm.connect(it)
    client.close() if it.dice % 2 else client.reset()


@step(8)
def send_everything_at_once(storm: Storm, it: Step) -> None:
    """Send everything at once; then disconnect, or wait for all the answers."""
    dice = it.random()
    hello = startup_message({"user": "postgres", "database": "app"})
    mark = f"INSERT INTO marks VALUES ('{it.token}', 'impatient'); SELECT 'answer'\0".encode()
    with dial(storm.address(it)) as client:
        calm = storm.calm()
        with suppress(ConnectionError):
            client.sendall(hello + frame(b"Q", mark) + TERMINATE * dice.randrange(2))
        way = dice.randrange(3)
        if way == 0:
            reset(client)
        elif way == 1:
            client.shutdown(socket.SHUT_WR)
            answer = read_to_the_end(client)
            if b"answer" not in answer and answer[:1] != b"E" and storm.calm() == calm >= 0:
                raise ViolationError(f"a client that sent everything at once got {answer!r}")
    storm.left(it.token, politely=False)


@step(1)
def exceed_the_idle_limit(storm: Storm, it: Step) -> None:
    """Send nothing for longer than a lease may be idle."""
    with _private(storm, it) as client:
        _pause(IDLE_SECONDS)
        try:
            client.query("SELECT pg_sleep(60)")
        except SqlError as error:
            raise ViolationError(f"a client that was idle too long got {error}") from error
        except GoneError:
            return
    raise ViolationError("was idle longer than allowed")


@step(20)
def share_a_session(storm: Storm, it: Step) -> None:
    """Write into a session that other clients use."""
    dice = it.random()
    word = dice.choice(WORDS)
    with storm.connect(it, word) as client:
        storm.inspect(client, word)
        for number in range(dice.randrange(1, 5)):
            client.query(f"INSERT INTO marks VALUES ('{word}', '{it.token}')")
            mine = client.query(f"SELECT count(*) FROM marks WHERE token = '{it.token}'")
            if mine != [(str(number + 1),)]:
                raise ViolationError(f"one connection inserted {number + 1} rows and sees {mine}")
        storm.inspect(client, word)
        client.close() if dice.random() < 0.7 else client.reset()


@step(6)
def half_close(storm: Storm, it: Step) -> None:
    """Half-close the connection while a statement runs; its answer must arrive nevertheless."""
    with _private(storm, it) as client:
        calm = storm.calm()
        client.ask(f"SELECT 'answer' || count(*) FROM marks, pg_sleep({it.dice % 30 / 100})")
        client.socket.shutdown(socket.SHUT_WR)
        answer = read_to_the_end(client.socket)
        if b"answer1" not in answer and storm.calm() == calm >= 0:
            raise ViolationError(f"the answer after a half-close was {answer[:200]!r}")


@step(8)
def disconnect_during_a_statement(storm: Storm, it: Step) -> None:
    """Disconnect in the middle of a statement."""
    with _private(storm, it) as client:
        # A client that only closes may still read, so the statement runs to its end.
        client.ask(f"SELECT pg_sleep({20 if it.dice % 2 else 0.5})")
        _pause(it.dice % 20 / 100)
        client.reset() if it.dice % 2 else client.socket.close()


@step(4)
def kill_a_client_process(storm: Storm, it: Step) -> None:
    """A client process is killed while its statement runs."""
    psql = shutil.which("psql")
    address = f"host=127.0.0.1 port={storm.port} user=postgres dbname=app"
    mark = f"INSERT INTO marks VALUES ('{it.token}', 'child')"
    if psql and it.dice % 2:
        argv = [psql, "-XAtc", "SELECT 'in'", "-c", mark, "-c", "SELECT pg_sleep(1)", address]
    else:
        program = (
            f"import psycopg; c = psycopg.connect({address!r}); c.execute({mark!r});"
            "print('in', flush=True); c.execute('SELECT pg_sleep(1)')"
        )
        argv = [sys.executable, "-c", program]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        if not select.select([child.stdout], [], [], SECONDS)[0]:
            child.kill()
            raise HangError("a client process got no answer")
        _pause(it.dice % 10 / 100)
        child.kill()
    storm.left(it.token, politely=False)


@step(8)
def cancel_a_running_statement(storm: Storm, it: Step) -> None:
    """Cancel a running statement."""
    with _private(storm, it) as client:
        client.canceled = True
        client.ask("SELECT pg_sleep(600)")
        deadline = time.monotonic() + SECONDS
        while not select.select([client.socket], [], [], 0.05)[0]:
            # A cancel request that arrives before the statement has started has no effect.
            cancel(storm.address(it), client.key)
            if time.monotonic() > deadline:
                raise HangError("could not be canceled")
        try:
            client.answer()
        except SqlError as error:
            if error.sqlstate != CANCELED:
                raise
        client.canceled = False
        _leave(storm, it, client)


@step(8)
def cancel_race(storm: Storm, it: Step) -> None:
    """Cancel statements as they end, and once more after the connection has been closed."""
    dice = it.random()
    with _private(storm, it) as client:
        client.canceled = True
        for _ in range(5):
            client.ask(f"SELECT pg_sleep({dice.random() / 200:.5f})")
            _pause(dice.random() / 200)
            cancel(storm.address(it), client.key)
            with suppress(SqlError):
                client.answer()
        _leave(storm, it, client)
    cancel(storm.address(it), client.key)


@step(6)
def cancel_with_wrong_keys(storm: Storm, it: Step) -> None:
    """A cancel request with another pid or another secret has no effect."""
    dice = it.random()
    with _private(storm, it) as client:
        client.ask("SELECT pg_sleep(0.2)")
        pid, secret = int.from_bytes(client.key[:4], "big"), client.key[4:]
        for key in (
            dice.randbytes(8),
            client.key[:4] + dice.randbytes(len(secret)),
            *((pid + off).to_bytes(4, "big") + secret for off in (-2, -1, 1, 2)),
        ):
            cancel(storm.address(it), key)
        client.answer()
        _leave(storm, it, client)


@step(16)
def invalid_start_up(storm: Storm, it: Step) -> None:
    """Send an invalid or incomplete start of a connection."""
    dice = it.random()
    whole = startup_message({"user": "postgres", "database": "app"})
    sent, expected = dice.choice([
        (whole[: dice.randrange(len(whole))], b""),
        (dice.randbytes(dice.randrange(1, 2000)), None),
        (untyped(SSL_CODE), b"N"),
        (b"", b""),
        (b"GET / HTTP/1.1\r\n\r\n", b""),
        (b"\x16\x03\x01" + dice.randbytes(200), NO_TLS),
        (b"\x7f\xff\xff\xff" + whole, b""),
        (b"\x00\x01\x00\x00" + whole, b"08P01"),
        (startup_message({"user": "postgres"}, 9 << 16), b"0A000"),
        (startup_message({"database": "app"}), b"28000"),
        (startup_message({"user": "postgres", "database": "app~"}), b"3D000"),
        (startup_message({"user": "x", "application_name": "pg_isready"}) + TERMINATE, b"Z"),
    ])  # fmt: skip
    with dial(storm.address(it)) as probe:
        with suppress(ConnectionError):
            probe.sendall(sent)
        way = dice.choices(["reset", "wait", "end", "listen"], [10, 10, 20, 1])[0]
        if way == "reset":
            reset(probe)
            return
        if way == "wait":
            _pause(_CUT_OFF_SECONDS)
            return
        if way == "end":
            with suppress(OSError):
                probe.shutdown(socket.SHUT_WR)
        received = read_to_the_end(probe)
    if expected is not None and len(expected) == 5:
        if received[:1] != b"E" or error_fields(received[5:])["C"] != expected.decode():
            raise ViolationError(f"{sent[:40]!r} was answered with {received!r}")
    elif expected == b"Z":
        if not received.endswith(b"Z\0\0\0\5I"):
            raise ViolationError(f"pg_isready was answered with {received!r}")
    elif expected is not None and received != expected:
        raise ViolationError(f"{sent[:40]!r} was answered with {received!r}")


@step(6)
def incomplete_copy(storm: Storm, it: Step) -> None:
    """Start a COPY that is not completed."""
    dice = it.random()
    with _private(storm, it) as client:
        client.query("COPY marks FROM STDIN")
        for _ in range(dice.randrange(100)):
            client.send(b"d", f"{it.token}\t{'x' * 1000}\n".encode())
        way = dice.randrange(4)
        if way == 0:
            client.reset()
        elif way == 1:
            client.socket.sendall(b"d\x00\x00")  # in the middle of a message
        elif way == 2:
            client.socket.shutdown(socket.SHUT_WR)
            read_to_the_end(client.socket)
        else:
            client.canceled = True  # PostgreSQL reports it with this SQLSTATE
            client.send(b"f", b"no\0")
            with suppress(SqlError):
                client.answer()
            client.canceled = False
            _leave(storm, it, client)


@step(6)
def unread_result(storm: Storm, it: Step) -> None:
    """Request a large result and do not read it."""
    with _private(storm, it) as client:
        client.ask("SELECT repeat('x', 1000) FROM generate_series(1, 100000)")
        client.socket.recv(1 + it.dice % 1000)
        _pause(it.dice % 30 / 100)
        client.reset() if it.dice % 2 else client.socket.close()


_ALTER = "DO $$BEGIN EXECUTE format('ALTER DATABASE %%I %s', current_database()); END$$"
LEAKS = (
    "CREATE ROLE {0} LOGIN",
    "CREATE ROLE {0};; CREATE TABLE owned (n int);; ALTER TABLE owned OWNER TO {0}",
    "CREATE ROLE {0};; GRANT {0} TO postgres;; GRANT pg_monitor TO {0}",
    "ALTER ROLE postgres SET chaos.mark = '{0}'",
    "CREATE DATABASE {0}",
    "BEGIN;; INSERT INTO marks VALUES ('{0}', 'prepared');; PREPARE TRANSACTION '{0}'",
    "SELECT pg_create_physical_replication_slot('{0}')",
    "SELECT pg_create_logical_replication_slot('{0}', 'pgoutput')",
    "SELECT pg_replication_origin_create('{0}')",
    "LISTEN {0};; NOTIFY {0};; SELECT pg_advisory_lock(4711)",
    "CREATE TEMP TABLE {0} (n int);; SET search_path = pg_temp",
    "SET chaos.mark = '{0}';; SET statement_timeout = 1;; SET ROLE pg_monitor",
    "BEGIN;; CREATE ROLE {0};; SELECT pg_advisory_xact_lock(4711);; LOCK marks",
    "CREATE TABLE {0} (n int);; CREATE SCHEMA {0}",
    "COMMENT ON ROLE postgres IS '{0}'",
    _ALTER % "IS_TEMPLATE true",
    _ALTER % "CONNECTION LIMIT 0",
    "CREATE ROLE {0};; " + _ALTER % "OWNER TO {0}",
    "CREATE PUBLICATION {0} FOR ALL TABLES",
    "CREATE SUBSCRIPTION {0} CONNECTION 'host=none.invalid' PUBLICATION {0} WITH (connect = false)",
)


@step(24)
def leak(storm: Storm, it: Step) -> None:
    """Leave objects outside the table of rows."""
    dice = it.random()
    with _private(storm, it) as client:
        if dice.random() < 0.15:
            client.query(f"ALTER SYSTEM SET log_line_prefix = 'x {it.token}'")
            client.query("SELECT pg_reload_conf()")
        for statement in dice.choice(LEAKS).format(it.token).split(";; "):
            client.query(statement)
        if dice.random() < 0.7:
            client.close()
            storm.left(it.token, politely=True)
        else:
            client.reset()


@step(4)
def terminate_own_backend(storm: Storm, it: Step) -> None:
    """Terminate the client's own backend."""
    with _private(storm, it) as client, suppress(GoneError):
        client.query("SELECT pg_terminate_backend(pg_backend_pid())")
        raise ViolationError("went on after it was terminated")


@step(4)
def stop_a_backend(storm: Storm, it: Step) -> None:
    """Stop a backend for a moment while its client waits or disconnects."""
    with _private(storm, it) as client:
        pid = _pid_of(client)
        with storm.process(pid) as (backend, _), storm.disaster("hold-up"):
            storm.send_signal(backend, signal.SIGSTOP)
            try:
                client.ask("SELECT 1")
                if it.dice % 2:
                    client.reset()
                # Sometimes longer than PostgreSQL itself waits for a backend to exit.
                _pause(0.1 + it.dice % 10 / 20 if it.dice % 13 else 7)
            finally:
                storm.send_signal(backend, signal.SIGCONT)
        if not it.dice % 2:
            client.answer()
            _leave(storm, it, client)


@step(3)
def crash_a_server_process(storm: Storm, it: Step) -> None:
    """Kill a backend or another process of a server, so that all its clients are disconnected."""
    with _private(storm, it) as client:
        pid = _pid_of(client)
        if it.dice % 3 == 0:
            siblings = storm.siblings(pid)
            pid = siblings[it.dice % len(siblings)]
        with storm.process(pid) as (backend, _), storm.disaster():
            storm.send_signal(backend, [signal.SIGSEGV, signal.SIGKILL][it.dice % 2])
            with suppress(GoneError):
                client.query("SELECT pg_sleep(60)")
                raise ViolationError("went on after a part of its server was killed")


@step(3)
def signal_a_server(storm: Storm, it: Step) -> None:
    """Kill the server, or shut it down while it has clients, as a clean-up script would."""
    number = it.random().choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
    with (
        _private(storm, it) as client,
        _postmaster(storm, client) as postmaster,
        storm.disaster(),
    ):
        storm.send_signal(postmaster, number)
        if number == signal.SIGTERM:  # its clients may stay
            _pause(0.3)
            client.close()
            return
        with suppress(GoneError):
            while True:
                client.query("SELECT pg_sleep(0.05)")


@step(2)
def stop_a_server_or_the_supervisor(storm: Storm, it: Step) -> None:
    """Stop a server, or the supervisor of all of them, for a moment."""
    with _private(storm, it) as client, storm.disaster("hold-up"), ExitStack() as until_then:
        if it.dice % 2:
            frozen = [until_then.enter_context(_postmaster(storm, client))]
        else:
            frozen = [until_then.enter_context(one) for one in storm.supervisors()]
        for one in frozen:
            storm.send_signal(one, signal.SIGSTOP)
        _pause(it.dice % 10 / 10)
        for one in frozen:
            storm.send_signal(one, signal.SIGCONT)
        _leave(storm, it, client)


@step(2)
def terminate_all_backends(storm: Storm, it: Step) -> None:
    """Cancel or terminate all backends of the server, including those of pgtemp."""
    with _private(storm, it) as client:
        others = "FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        if it.dice % 2:
            client.query(f"SELECT pg_cancel_backend(pid) {others} AND datname = 'postgres'")
        else:
            with storm.disaster():
                client.query(f"SELECT pg_terminate_backend(pid) {others}")
        _leave(storm, it, client)


@step(3)
def lock_catalogs(storm: Storm, it: Step) -> None:
    """For a moment, no client can log in and no database can be created."""
    with _private(storm, it) as client, storm.disaster("hold-up"):
        table = ["pg_database", "pg_authid", "pg_db_role_setting"][it.dice % 3]
        client.query(f"BEGIN; LOCK {table}; SELECT pg_sleep({it.dice % 10 / 10})")
        if it.dice % 2:
            client.reset()
        else:
            client.query("COMMIT")
            _leave(storm, it, client)


@step(1)
def kill_supervisors(storm: Storm, it: Step) -> None:
    """Kill the supervisor of all servers, and thereby the servers."""
    with storm.disaster("upheaval"):
        for supervisor in storm.supervisors():
            with supervisor as one:
                storm.send_signal(one, signal.SIGKILL)
        _pause(it.dice % 10 / 20)


@step(1)
def fill_disk(storm: Storm, it: Step) -> None:
    """Write until the disk is full, and then disconnect."""
    if not storm.small_disk:
        return
    with _private(storm, it) as client, storm.disaster("upheaval"):
        client.query("CREATE UNLOGGED TABLE much (t text)")
        client.query("ALTER TABLE much ALTER t SET STORAGE EXTERNAL")
        with suppress(GoneError):
            try:
                for _ in range(100):
                    client.query(
                        "INSERT INTO much SELECT repeat('x', 1000000) FROM generate_series(1, 20)"
                    )
            except SqlError as error:
                if error.sqlstate != "53100":
                    raise
            _pause(it.dice % 10 / 20)
            client.close() if it.dice % 2 else client.reset()


@step(1)
def edit_template(storm: Storm, it: Step) -> None:
    """Change the template from which all later leases start."""
    storm.edits.add(it.token)
    with storm.connect(it, "template") as client:
        calm = storm.calm("upheaval")
        client.query(f"INSERT INTO version VALUES ('{it.token}')")
        if it.dice % 3:
            client.close()
            storm.sealed(it.token, calm)
        else:
            client.reset()


@contextmanager
def _postmaster(storm: Storm, client: Client) -> Iterator[int]:
    with storm.process(_pid_of(client)) as (_, data_dir):
        pid = int((data_dir / "postmaster.pid").read_text().split("\n")[0])
        with storm.process(pid) as (postmaster, _):
            yield postmaster


def _pid_of(client: Client) -> int:
    return int(str(client.query("SELECT pg_backend_pid()")[0][0]))
