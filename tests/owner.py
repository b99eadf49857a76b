"""An owner: a process that has servers, and that tests end in every possible way."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

from pgtemp.supervisor.crash import all_postgres
from pgtemp.supervisor.leftovers import REMOVING

_SECONDS = 60.0
_BEGINNING = """
import os, resource, signal, sys, threading
from pathlib import Path
import psycopg
from pgtemp import Cluster, PgTempDB
from pgtemp.supervisor import supervision
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

def report(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def report_server(data_dir):  # the test checks that nothing of it is left
    pid = open(data_dir / "postmaster.pid").readline().strip()
    report("server", data_dir, pid, supervision.current().pid)
"""


@dataclass
class Server:
    """A server's directory and processes, to check later whether they are removed."""

    data_dir: Path
    postmaster: int
    supervisor: int

    def leftovers(self) -> list[object]:
        """Directories, processes and shared memory of the server, and its supervisor."""
        run_dir = self.data_dir.parent
        paths = [run_dir, run_dir.with_name(run_dir.name + REMOVING)]
        return [
            *(path for path in paths if os.path.lexists(path)),
            *(pid for pid, cwd in all_postgres() if cwd.startswith(str(self.data_dir))),
            *(pid for pid in (self.postmaster, self.supervisor) if is_running(pid)),
            *segments_of(self.postmaster),
        ]


@dataclass
class Owner:
    """A Python process with servers that runs a script.

    The script calls `report_server(data_dir)` for each server, and `report(word)` for its progress.
    """

    script: str
    servers: list[Server] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._output = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BEGINNING + dedent(self.script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip

    def wait_for(self, word: str) -> str:
        """Wait for a line that starts with this word and return it; record reported servers."""
        while (line := self._line(_SECONDS)) is not None:
            if line.startswith(word):
                return line
        raise AssertionError(f"the owner did not report {word!r}")

    def send(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word.encode() + b"\n")

    def end(self) -> int:
        """Wait until it exits; return the exit status."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        status = self.process.wait(timeout=_SECONDS)
        # A forked child may hold the other end, so do not wait for the end of the output.
        while self._line(0) is not None:
            pass
        self.process.stdout.close()
        return status

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.process.kill()
        self.end()

    def leftovers(self) -> list[object]:
        """Everything that is left of its servers."""
        assert self.servers, "the owner reported no server"
        return [thing for server in self.servers for thing in server.leftovers()]

    def _line(self, seconds: float) -> str | None:
        """The next line of its output within a number of seconds."""
        out = self.process.stdout
        assert out is not None
        while b"\n" not in self._output:
            if not select.select([out], [], [], seconds)[0] or not (data := out.read(65536)):
                return None
            self._output += data
        line, _, self._output = self._output.partition(b"\n")
        if line.startswith(b"server "):
            _, data_dir, postmaster, supervisor = line.decode().split()
            self.servers.append(Server(Path(data_dir), int(postmaster), int(supervisor)))
        return line.decode()


def segments_of(pid: int) -> list[str]:
    """System V shared memory segments that a process has created."""
    with open("/proc/sysvipc/shm") as table:
        rows = [line.split() for line in table][1:]
    return [f"segment {row[1]}" for row in rows if int(row[4]) == pid]


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def is_computing(pid: int) -> bool:
    """Whether a process runs and has used a tenth of a second of processor time."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] == "R" and int(fields[11]) >= 10
