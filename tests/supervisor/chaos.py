"""A storm: a daemon, clients that follow a random plan of misbehavior, and the checks.

The plan is made before anything runs, so a seed repeats the storm, except for its timing.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path

from chaos_steps import STEPS, WORDS, Step

from pgtemp.supervisor.leftovers import PREFIX
from rawclient import SECONDS, Client, GoneError, HangError, RefusedError, SqlError, ViolationError
from support import Daemon, children, eventually

TEMPLATE = """
CREATE TABLE marks (lease text NOT NULL, token text NOT NULL);
CREATE TABLE version (edit text NOT NULL);
INSERT INTO version VALUES ('base');
"""
# Everything that a lease could see of another. Each name that a lease has chosen contains its
# token.
_SEEN = """
SELECT 'row of ' || lease FROM marks
UNION ALL SELECT 'version ' || edit FROM version
UNION ALL SELECT 'role ' || rolname FROM pg_roles
UNION ALL SELECT 'membership of ' || member::regrole FROM pg_auth_members
UNION ALL SELECT 'database ' || datname FROM pg_database
UNION ALL SELECT 'setting ' || current_setting('chaos.mark', true)
UNION ALL SELECT 'prefix ' || current_setting('log_line_prefix')
UNION ALL SELECT 'prepared ' || gid FROM pg_prepared_xacts
UNION ALL SELECT 'slot ' || slot_name FROM pg_replication_slots
UNION ALL SELECT 'origin ' || roname FROM pg_replication_origin
UNION ALL SELECT 'channel ' || pg_listening_channels()
UNION ALL SELECT 'relation ' || relname FROM pg_class
UNION ALL SELECT 'schema ' || nspname FROM pg_namespace
UNION ALL SELECT 'comment ' || description FROM pg_shdescription
"""
# The daemon notices a moment later that a client has reset its connection or lost its server. A new
# client waits at most two seconds for the leak check of other leases (daemon/lease_manager.py).
_NOTICED_SECONDS = 10.0
# Disasters in which other clients lose their connections; those in which an edited template may be
# lost as well; and those in which everything takes longer.
CRASH, UPHEAVAL, HOLD_UP = "crash", "upheaval", "hold-up"
# SQLSTATEs of a server that is about to exit, has had a crash, or has no disk space.
_IN_A_DISASTER = ("08", "53", "57P", "58", "XX")
_REFUSALS = {"53100", "53300", "57P01", "57P03", "57P02", "57P05", "3D000"}


def plan(seed: int, clients: int, steps: int) -> list[list[Step]]:
    """The steps of each client, from the seed alone."""
    dice = random.Random(seed)
    names, weights = list(STEPS), [weight for weight, _ in STEPS.values()]
    return [
        [
            Step(client, number, dice.choices(names, weights)[0], dice.getrandbits(32))
            for number in range(steps)
        ]
        for client in range(clients)
    ]


class Served(Daemon):
    """A daemon whose standard error a thread reads, since a pipe may be too small for it."""

    _reading: threading.Thread | None = None

    def __init__(self, *arguments: str, dbname: str = "test") -> None:
        super().__init__(*arguments, dbname=dbname)
        self.errors: list[str] = []
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.errors += self.process.stderr

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        if self._reading is None:  # it did not start
            return super().end(number)
        Daemon.running.discard(self)
        with closing(self.process.stdout), closing(self.process.stderr):  # type: ignore[type-var]
            self.process.send_signal(number)
            self.process.wait(SECONDS)
            self._reading.join(SECONDS)
        return self.process.returncode, "".join(self.errors)


class Storm:
    """One storm.

    Attributes:
        violations: descriptions of errors that must not happen.
        outcomes: how often each step had each outcome.
        over: whether the daemon is being stopped.
        edits: all rows that a step has begun to write into the template.
    """

    def __init__(self, served: Served, seed: int, place: Path, *, small_disk: bool) -> None:
        self.served = served
        self.port = served.port
        self.seed = seed
        self.place = place.resolve()
        self.small_disk = small_disk
        self.violations: list[str] = []
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.over = False
        self._begun: Counter[str] = Counter()  # disasters, by kind
        self._ended: Counter[str] = Counter()
        self.edits: set[str] = {"base"}
        self._sealed: dict[str, tuple[float, int]] = {}
        # When leases ended, and the state of calm() at that moment if nothing of them may be
        # visible after it.
        self._ended_leases: dict[str, tuple[float, int]] = {}
        self._segments: set[str] = set()  # shared memory of the daemon's servers
        self._log: list[str] = []
        self._lock = threading.Lock()
        output = "".join(served.output)
        self._socket = f"{output.split('socket is in ')[1].split(';')[0]}/.s.PGSQL.{self.port}"

    def run(self, clients: int, steps: int) -> None:
        """Run the plans of all clients to their ends."""
        self._start = time.monotonic()
        over = threading.Event()
        with ThreadPoolExecutor(clients + 1) as threads:
            threads.submit(self._note_segments, over)
            list(threads.map(self._play, plan(self.seed, clients, steps)))
            over.set()

    def _note_segments(self, over: threading.Event) -> None:
        while not over.wait(0.05):
            for file in self.place.glob(f"{PREFIX}*/data/postmaster.pid"):
                with suppress(OSError, IndexError):  # the server has just started or stopped
                    self._segments.add(file.read_text().split("\n")[6].split()[1])

    def end_after(self, steps: int, number: int) -> tuple[int, str]:
        """Send the daemon a signal after a number of steps."""
        assert eventually(lambda: self.outcomes.total() >= steps, 5 * SECONDS)
        self.over = True
        return self.served.end(number)

    def _play(self, steps: list[Step]) -> None:
        for it in steps:
            if self.over:
                return
            began = time.monotonic()
            outcome = self._outcome(it)
            with self._lock:
                self.outcomes[it.name, outcome.split(":")[0]] += 1
                self._log.append(
                    f"{began - self._start:7.2f} +{time.monotonic() - began:5.2f} {it}: {outcome}"
                )

    def _outcome(self, it: Step) -> str:
        try:
            STEPS[it.name][1](self, it)
        except RefusedError as error:
            if error.sqlstate not in _REFUSALS:
                self.violations.append(f"{it}: refused with {error}")
            return f"refused {error.sqlstate}: {error}"
        except GoneError as error:
            return f"gone: {error}"
        except SqlError as error:
            if not error.sqlstate.startswith(_IN_A_DISASTER):
                self.violations.append(f"{it}: {error}")
            return f"failed {error.sqlstate}: {error}"
        except ViolationError as error:
            if self.over and not isinstance(error, HangError):
                return f"over: {error}"
            self.violations.append(f"{it}: {error}")
            return f"VIOLATION: {error}"
        except Exception:
            if self.over:
                return f"over: {traceback.format_exc()}"
            self.violations.append(f"{it}: {traceback.format_exc()}")
            return f"ERROR: {traceback.format_exc()}"
        return "done"

    def story(self) -> str:
        """The information needed to investigate a failure."""
        return "\n".join([
            f"PGTEMP_CHAOS_SEED={self.seed} is this storm again",
            *self.violations, "", *self._log, "", *self.served.errors,
        ])  # fmt: skip

    # used by steps

    def address(self, it: Step) -> tuple[str, int] | str:
        """The daemon's port or, sometimes, its socket."""
        return self._socket if it.dice % 5 == 0 else ("127.0.0.1", self.port)

    def connect(self, it: Step, session: str | None = None) -> Client:
        dbname = f"app~{session}" if session else "app"
        user = "somebody" if it.dice % 7 == 0 else "postgres"
        return Client(
            self.address(it), user=user, database=dbname, application_name=f"app{it.dice % 3}"
        )

    def inspect(self, client: Client, lease: str) -> None:
        """Check that nothing is visible of a lease that ended before this one began."""
        seen = {str(row[0]) for row in client.query(_SEEN)}
        for what in seen:
            kind, _, name = what.rpartition(" ")
            if kind == "version" and name not in self.edits:
                raise ViolationError(f"a template of unknown origin: {what}")
            if kind == "row of" and name != lease:
                raise ViolationError(f"lease {lease} reads a {what}")
            if lease not in WORDS:  # a session may have begun before, in the same server
                self._check_gone(name.strip(), what, client.asked)
        calm = self.calm(UPHEAVAL)
        versions = {
            token for token, (when, then) in self._sealed.items()
            if when < client.asked and then == calm >= 0
        }  # fmt: skip
        missing = {"base", *versions} - {what.removeprefix("version ") for what in seen}
        if missing and lease not in WORDS:
            raise ViolationError(f"the template lacks what was written into it: {missing}")

    def _check_gone(self, token: str, what: str, asked: float) -> None:
        gone, calm = self._ended_leases.get(token, (asked, -1))
        late = 0.0 if self.calm(HOLD_UP) == calm >= 0 else _NOTICED_SECONDS
        if gone + late < asked:
            raise ViolationError(f"sees {what}, of a lease that ended {asked - gone:.2f} s before")

    def sealed(self, token: str, calm: int) -> None:
        """Record that a template was edited, and its editor disconnected properly."""
        self._sealed[token] = time.monotonic(), calm

    def left(self, token: str, *, politely: bool) -> None:
        """Record that a lease's client has disconnected."""
        calm = self.calm(HOLD_UP) if politely else -1
        self._ended_leases.setdefault(token, (time.monotonic(), calm))

    @contextmanager
    def disaster(self, kind: str = CRASH) -> Iterator[None]:
        """During this block, other clients may lose their leases."""
        kinds = {HOLD_UP} if kind == HOLD_UP else {CRASH, HOLD_UP, kind}
        with self._lock:
            self._begun.update(kinds)
        try:
            yield
        finally:
            with self._lock:
                self._ended.update(kinds)

    def calm(self, kind: str = CRASH) -> int:
        """A number that stays the same while there is no disaster; negative while there is one."""
        with self._lock:
            begun = self._begun[kind]
            return begun if begun == self._ended[kind] else -1

    @contextmanager
    def process(self, pid: int) -> Iterator[tuple[int, Path]]:
        """A descriptor of a process of this daemon's servers, and its data directory.

        Raises GoneError.
        """
        with self._opened(pid) as descriptor:
            try:
                data_dir = Path(os.readlink(f"/proc/{pid}/cwd"))
            except OSError as error:
                raise GoneError("ended already") from error
            if not data_dir.is_relative_to(self.place):
                raise GoneError(f"{pid} is not a process of this daemon, it works in {data_dir}")
            yield descriptor, data_dir

    @staticmethod
    def send_signal(descriptor: int, number: int) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)

    def siblings(self, pid: int) -> list[int]:
        """The other processes of a backend's server, without the postmaster."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            return list(children(int(stat.rpartition(")")[2].split()[1])))
        except OSError as error:
            raise GoneError("ended already") from error

    def supervisors(self) -> list[AbstractContextManager[int]]:
        """The supervisor of this daemon's servers; usually one."""
        return [
            self._opened(pid) for pid in children(self.served.process.pid)
            if b"pgtemp.supervisor.process" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]  # fmt: skip

    @contextmanager
    def _opened(self, pid: int) -> Iterator[int]:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError as error:
            raise GoneError("ended already") from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    # checks at the end

    def check_service(self) -> None:
        """The daemon serves clients as before the storm."""
        asked = time.monotonic()
        for word in (None, *WORDS, "template", None):
            it = Step(0, 0, f"aftermath of {word}", 1)
            assert eventually(lambda it=it, word=word: self._is_served(it, word), SECONDS), word
        assert time.monotonic() - asked < 3 * SECONDS

    def _is_served(self, it: Step, word: str | None) -> bool:
        try:
            with self.connect(it, word) as client:
                self.inspect(client, str(word))
                client.close()
        except (RefusedError, GoneError, SqlError):
            return False
        return True

    def held(self) -> tuple[int, int, int]:
        """The number of descriptors and threads of the daemon, and of run directories."""
        proc = Path(f"/proc/{self.served.process.pid}")
        return (
            len(os.listdir(proc / "fd")),
            len(os.listdir(proc / "task")),
            len(list(self.place.glob(f"{PREFIX}*"))),
        )

    def leftovers(self) -> list[str]:
        """Everything that is left of the daemon and its servers."""
        found = [str(path) for path in self.place.glob("*")]
        found += [self._socket] if os.path.lexists(os.path.dirname(self._socket)) else []
        with open("/proc/sysvipc/shm") as table:
            segments = {line.split()[1] for line in table}
        found += [f"segment {number}" for number in self._segments & segments]
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/cwd").startswith(f"{self.place}/"):
                    found.append(f"process {pid}")
        return found
