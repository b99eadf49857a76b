"""A process that has servers, to be ended in every way there is."""

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

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def mine(data_dir):  # what to look for afterwards
    pid = open(data_dir / "postmaster.pid").readline().strip()
    tell("server", data_dir, pid, supervision.current().pid)
"""


@dataclass
class Server:
    """What there was of a server, to see whether it is gone."""

    data_dir: Path
    postmaster: int
    warden: int

    def left(self) -> list[object]:
        """Its directories, its processes, its kernel objects; the warden, if nothing else was."""
        home = self.data_dir.parent
        places = [home, home.with_name(home.name + REMOVING)]
        return [
            *(place for place in places if os.path.lexists(place)),
            *(pid for pid, cwd in all_postgres() if cwd.startswith(str(self.data_dir))),
            *(pid for pid in (self.postmaster, self.warden) if is_running(pid)),
            *segments_of(self.postmaster),
        ]


@dataclass
class Owner:
    """A Python process with servers, which does what a script says.

    The script calls `mine(data_dir)` for each server, and `tell(word)` when it has come so far.
    """

    script: str
    servers: list[Server] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._heard = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BEGINNING + dedent(self.script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip

    def hear(self, word: str) -> str:
        """Wait until it says that; the whole line. Servers are remembered meanwhile."""
        while (line := self._line(_SECONDS)) is not None:
            if line.startswith(word):
                return line
        raise AssertionError(f"it did not say {word!r}")

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word.encode() + b"\n")

    def end(self) -> int:
        """Wait for its end; the exit status."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        status = self.process.wait(timeout=_SECONDS)
        # A forked child may hold the other end, so no waiting for the end of what is said.
        while self._line(0) is not None:
            pass
        self.process.stdout.close()
        return status

    def kill(self) -> None:
        """SIGKILL it."""
        self.process.kill()
        self.end()

    def left(self) -> list[object]:
        """What there is of its servers."""
        assert self.servers, "it had no server"
        return [thing for server in self.servers for thing in server.left()]

    def _line(self, seconds: float) -> str | None:
        """The next line that it says within so many seconds."""
        out = self.process.stdout
        assert out is not None
        while b"\n" not in self._heard:
            if not select.select([out], [], [], seconds)[0] or not (data := out.read(65536)):
                return None
            self._heard += data
        line, _, self._heard = self._heard.partition(b"\n")
        if line.startswith(b"server "):
            _, data_dir, postmaster, warden = line.decode().split()
            self.servers.append(Server(Path(data_dir), int(postmaster), int(warden)))
        return line.decode()


def segments_of(pid: int) -> list[str]:
    """System V shared memory that a process has made."""
    with open("/proc/sysvipc/shm") as table:
        rows = [line.split() for line in table][1:]
    return [f"segment {row[1]}" for row in rows if int(row[4]) == pid]


def is_running(pid: int) -> bool:
    """Whether a process is there and not just waiting to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def is_computing(pid: int) -> bool:
    """Whether a process has used a tenth of a second of processor time."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] == "R" and int(fields[11]) >= 10
