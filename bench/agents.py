"""Programs in five languages that use pgtemp's peers: how they are built, run and controlled.

bench/peers/README.md describes their commands. They are built in their own cache, from each
language's registry. If a program cannot be built or started, the tables contain the reason. All
programs run as an ordinary user, since PostgreSQL does not run as root.
"""

from __future__ import annotations

import glob
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

from bench.report import Failed
from pgtemp import PgTempDB
from pgtemp.host import identity, ports, procfs
from pgtemp.programs import search

PEERS = Path(__file__).parent / "peers"
ROOT = PEERS.parents[1]
SHM = Path("/dev/shm")
_PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3", sys.executable)


def cache() -> Path:
    """The directory of the built agents; not below a home that is closed to ordinary users."""
    if os.geteuid() == 0:
        return Path("/var/cache/pgtemp-bench")
    return Path(platformdirs.user_cache_dir("pgtemp-bench"))


@dataclass(frozen=True, slots=True)
class Language:
    """How the agents of one language are built and run.

    Attributes:
        build: commands that run in the directory of the sources; `{out}` is their output directory.
        run: the command, without the peer's name; `{directory}` is the agent's data directory.
        environment: of the build.
    """

    build: tuple[tuple[str, ...], ...]
    run: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def _python() -> str:
    return next(one for one in _PYTHONS if Path(one).exists())


LANGUAGES = {
    "python": Language(
        build=(
            (_python(), "-m", "venv", "--without-pip", "{out}"),
            (sys.executable, "-m", "pip", "--quiet", "--python", "{out}/bin/python", "install",
             "--upgrade", "-r", "requirements.txt", str(ROOT)),
        ),
        run=("{out}/bin/python", "{source}/agent.py"),
    ),
    "node": Language(
        build=(
            ("cp", "-r", "{source}/.", "{out}"),
            ("npm", "--prefix", "{out}", "--silent", "ci"),
        ),
        run=("node", "{out}/agent.mjs"),
    ),
    "go": Language(
        build=(
            ("go", "build", "-o", "{out}/peers", "."),
            ("go", "build", "-o", "{out}/integresql",
             "github.com/allaboutapps/integresql/cmd/server"),
        ),
        run=("{out}/peers",),
        environment={"CGO_ENABLED": "0"},
    ),
    "rust": Language(
        build=(
            ("cargo", "install", "--quiet", "pgtemp", "--version", "0.7.1", "--locked",
             "--features", "cli", "--root", "{out}"),
            ("cargo", "build", "--quiet", "--release", "--locked"),
        ),
        run=("{out}/release/peers",),
        environment={"CARGO_TARGET_DIR": "{out}"},
    ),
    "java": Language(
        build=(("mvn", "-q", "-B", "package", "-Dout={out}"),),
        run=("java", "-XX:-UsePerfData", "-Djava.io.tmpdir={directory}", "-cp", "{out}/jars/*",
             "peers.Main"),
    ),
}  # fmt: skip


def build(language: str) -> str | None:
    """Build the agents of a language if their sources have changed; return the error, if any."""
    how, out, source = LANGUAGES[language], cache() / language, PEERS / language
    built = out / ".built"
    newest = max(path.stat().st_mtime for path in source.rglob("*") if path.is_file())
    if language == "python":
        newest = max(newest, *(one.stat().st_mtime for one in (ROOT / "src").rglob("*.py")))
    if built.exists() and built.stat().st_mtime > newest:
        return None
    print(f"building the agents in {language} (once)", file=sys.stderr)
    out.mkdir(parents=True, exist_ok=True)
    names = {"out": str(out), "source": str(source)}
    environment = {name: value.format(**names) for name, value in how.environment.items()}
    for command in how.build:
        argv = [word.format(**names) for word in command]
        if shutil.which(argv[0]) is None:
            return f"there is no {argv[0]}"
        done = subprocess.run(
            argv, cwd=source, env={**os.environ, **environment},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            return f"{' '.join(argv[:3])}: {done.stderr.strip().splitlines()[-1:]}"
    built.touch()
    return None


class User:
    """The user that runs the agents; PostgreSQL does not run as root."""

    def __init__(self) -> None:
        self.owner = identity.choose(None)
        self.name = pwd.getpwuid(self.owner.uid).pw_name

    def argv(self, command: Sequence[str]) -> list[str]:
        if not self.owner.switch:
            return list(command)
        ids = ["--reuid", str(self.owner.uid), "--regid", str(self.owner.gid)]
        return ["setpriv", *ids, "--clear-groups", *command]

    @contextmanager
    def data_directory(self) -> Iterator[Path]:
        """A directory of the user. At the end, its processes are stopped and it is removed."""
        path = Path(tempfile.mkdtemp(prefix="bench-", dir=SHM))
        os.chown(path, self.owner.uid, self.owner.gid)
        try:
            yield path
        finally:
            # A server removes its shared memory when it exits, unless it is killed.
            for number, seconds in ((signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)):
                for pid in processes_in(path):
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
                until = time.monotonic() + seconds
                while processes_in(path) and time.monotonic() < until:
                    time.sleep(0.01)
            subprocess.run(["rm", "-rf", path], check=True)

    def environment(self, home: Path, data_directory: Path, programs: Path) -> dict[str, str]:
        usual = "/usr/local/bin:/usr/bin:/bin"
        node = f":{Path(found).parent}" if (found := shutil.which("node")) else ""
        return {
            "PATH": f"{programs}:{usual}{node}",
            "HOME": str(home),
            "USER": self.name,
            "LANG": "C.UTF-8",
            "TMPDIR": str(data_directory),
            "PGTEMP_CACHE_DIR": str(home / "pgtemp"),
            "BENCH_BIN": str(programs),
            "BENCH_DATA": str(data_directory),
            "BENCH_CACHE": str(home),
        }


def processes_in(path: Path) -> list[int]:
    """Processes whose working directory is, or was, in a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if os.readlink(entry / "cwd").startswith(f"{path}/"):
                    found.append(int(entry.name))
    return found


def programs(version: str) -> Path:
    """The directory of PostgreSQL's programs, at a path that the user can run."""
    found = search.find(None, version).within_reach(identity.choose(None))
    return Path(found.program("postgres")).parent


class Agent:
    """A running agent."""

    def __init__(self, language: str, peer: str, environment: dict[str, str], user: User) -> None:
        self.data_directory = Path(environment["BENCH_DATA"])
        names = {
            "out": str(cache() / language),
            "source": str(PEERS / language),
            "directory": str(self.data_directory),
        }
        argv = [word.format(**names) for word in LANGUAGES[language].run]
        self._log = open(self.data_directory / "agent.log", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            user.argv([*argv, peer]), cwd=self.data_directory, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip

    def request(self, command: str) -> dict[str, Any]:
        """Send a command and return the answer. Raises Failed with the agent's message."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            raise Failed((self._log.read().strip().splitlines() or ["the agent has exited"])[-1])
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(str(answer["error"]))
        return answer

    def ms(self, command: str) -> float:
        return float(self.request(command)["ms"])

    def kill(self) -> None:
        self.process.kill()
        self._close()

    def end(self) -> None:
        """Close its input, so that it removes all it has created, and wait for its exit."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._close()

    def _close(self) -> None:
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self._log):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


class Setup:
    """The user, the programs and the servers that agents use."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.user = User()
        self.programs = programs(version)
        version_line = subprocess.check_output([self.programs / "postgres", "--version"], text=True)
        self.release = version_line.split()[2]
        self._unbuilt: dict[str, str | None] = {}

    def check(self, language: str) -> None:
        """Raise Failed if a language's agents cannot be built."""
        if language not in self._unbuilt:
            self._unbuilt[language] = build(language)
        if (reason := self._unbuilt[language]) is not None:
            raise Failed(reason)

    @contextmanager
    def agent(self, language: str, peer: str, server: str = "") -> Iterator[Agent]:
        """An agent for a block, with its own directories on tmpfs."""
        self.check(language)
        with self.user.data_directory() as data_directory:
            home = data_directory / "kept"
            home.mkdir()
            os.chown(home, self.user.owner.uid, self.user.owner.gid)
            environment = self.user.environment(home, data_directory, self.programs)
            agent = Agent(language, peer, {**environment, "BENCH_SERVER": server}, self.user)
            try:
                yield agent
            finally:
                agent.end()

    @contextmanager
    def server(self) -> Iterator[str]:
        """The URL of a server with pgtemp's settings and without a password, on tmpfs."""
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as hba:
            hba.write("local all all trust\nhost all all all trust\n")
            hba.flush()
            Path(hba.name).chmod(0o644)
            config = {"max_connections": 200}
            with PgTempDB(version=self.version, pg_hba_conf=hba.name, config=config) as db:
                yield f"postgresql://postgres@127.0.0.1:{db.port}/postgres"

    @contextmanager
    def daemon(self, *arguments: str) -> Iterator[tuple[str, int]]:
        """The URL and the pid of a pgtemp daemon to which the user may connect."""
        self.check("python")
        uri = f"postgresql://postgres@127.0.0.1:{ports.free_port('127.0.0.1')}/app"
        with self.user.data_directory() as data_directory:
            environment = self.user.environment(data_directory, data_directory, self.programs)
            command = [str(cache() / "python/bin/python"), "-m", "pgtemp", *arguments]
            process = subprocess.Popen(
                self.user.argv([*command, "--bin-dir", str(self.programs), uri]),
                stdout=subprocess.PIPE, text=True, env=environment, cwd=data_directory,
            )  # fmt: skip
            assert process.stdout is not None
            try:
                while "Ctrl-C" not in (line := process.stdout.readline()):
                    if not line:
                        raise Failed("the daemon has not started")
                yield uri, process.pid
            finally:
                process.terminate()
                process.communicate()


def await_removal(pid: int, directories: Sequence[str], most: float) -> bool:
    """Whether a process has exited and directories are removed within a number of seconds.

    A directory counts even if it was renamed in order to be removed in the background.
    """
    until = time.perf_counter() + most
    while procfs.lives(pid) or any(glob.glob(f"{one}*") for one in directories):
        if time.perf_counter() > until:
            return False
    return True
