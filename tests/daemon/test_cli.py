"""The command line: its output, and above all its error messages."""

from __future__ import annotations

import os
from pathlib import Path

import psycopg
import pytest

from pgtemp import ClusterError
from pgtemp.cli import main
from pgtemp.cli.group import cli
from pgtemp.host import ports
from support import Daemon, run_pgtemp


def check_error(*arguments: str, word: str, env: dict[str, str] | None = None) -> None:
    """Check for one line with a remedy on standard error, and exit status 2."""
    result = run_pgtemp(*arguments, env=env)
    assert result.returncode == 2, result
    assert "Traceback" not in result.stderr
    assert word in result.stderr
    assert result.stderr.startswith("pgtemp: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert ";" in result.stderr, "no remedy"
    assert result.stdout == ""


def test_two_daemons_on_one_port(daemon: type[Daemon]) -> None:
    """The second daemon names the process that uses the port, and starts nothing."""
    served = daemon("--pool", "0")
    check_error(served.uri, word=f"port {served.port}")
    assert f"pid {served.process.pid}" in run_pgtemp(served.uri).stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--no-such-option"], "--no-such-option"),
        (["mysql://localhost/x"], "not a PostgreSQL URI"),
        (["postgresql://localhost:99999/x"], "not a port"),
        (["postgresql://db.example.invalid/x"], "not this machine"),
        (["postgresql://192.0.2.1:6543/x"], "not this machine"),
        (["postgresql:///x?host=/tmp"], "not this machine"),
        (["--load-from", "/nowhere.sql"], "/nowhere.sql"),
        (["--data-dir-prefix", "/nowhere"], "/nowhere"),
        (["--persist", "--data-dir-prefix", "/dev/shm"], "tmpfs"),
        (["-o", "nonsense"], "NAME=VALUE"),
        (["-o", "a b=c"], "'a b'"),
        (["--pool", "-1"], "pool=-1"),
        (["--template", "app=x.sql", "--template", "app=y.sql"], "app is given twice"),
        (["--template", "a:b=x.sql"], "cannot start from b"),
        (["--template", "a:b=x.sql", "--template", "b:a=x.sql"], "cannot start from"),
        (["--template", "a:a=x.sql"], "it would start from itself"),
        (["--template", "a=/nowhere.sql"], "/nowhere.sql"),
        (["--watch", "a=*"], "it does not start with the name of a template"),
        (["--template", "a=cmd:"], "is invalid"),
        (["--template", "a~b=x.sql"], "no ~ in NAME"),
        (["postgresql://localhost:6599/app~x"], "leave out ~ and the suffix here"),
        (["--single", "--template", "a=x.sql"], "single"),
        (["--role-attributes", "SUPERMAN"], "SUPERMAN"),
        (["--isolation", "none"], "none"),
        (["--max-databases", "0"], "max_databases=0"),
        (["--linger", "-1"], "linger=-1"),
        (["--pool", "many"], "many"),
        (["--ttl", "0"], "ttl"),
        (["--pg-version", "sixteen"], "sixteen"),
        (["--log-level", "loud"], "loud"),
        (["--run-as", "no-such-user"], "run_as"),
        (["open", "/nowhere"], "/nowhere"),
        (["open", "/tmp"], "/tmp"),
        (["postgresql://localhost:6999/x", "another"], "another"),
        (["sevre"], "did you mean serve"),
        (["other"], "begins with postgresql://"),
    ],
)
def test_invalid_input_gives_one_line_and_status_2(arguments: list[str], word: str) -> None:
    named = any("://" in argument for argument in arguments) or arguments[0] in (
        "open",
        "sevre",
        "other",
    )
    port = ports.free_port("127.0.0.1")
    check_error(*arguments, *([] if named else [f"postgresql://localhost:{port}/x"]), word=word)


def test_a_prefix_that_cannot_be_written(open_dir: Path) -> None:
    """The error names the directory, and nothing is created."""
    prefix = Path("/sys/kernel") if os.geteuid() == 0 else open_dir / "closed"
    if os.geteuid() != 0:
        prefix.mkdir(mode=0o500)
    port = ports.free_port("127.0.0.1")
    check_error(
        "--data-dir-prefix", str(prefix), f"postgresql://localhost:{port}/x", word=str(prefix)
    )


def test_a_missing_postgresql_lists_the_searched_directories(open_dir: Path) -> None:
    """The error lists the directories that were searched and the commands that fix it."""
    result = run_pgtemp("--bin-dir", str(open_dir), "postgresql://localhost:6999/x")
    assert result.returncode == 2
    assert str(open_dir) in result.stderr and "contains postgres and initdb" in result.stderr
    result = run_pgtemp("--pg-version", ">90", "postgresql://localhost:6999/x")
    assert result.returncode == 2
    assert "/usr/lib/postgresql" in result.stderr and "apt-get install postgresql" in result.stderr


def test_an_invalid_setting_is_an_error_at_the_start() -> None:
    port = ports.free_port("127.0.0.1")
    result = run_pgtemp("-o", "max_connections=lots", f"postgresql://localhost:{port}/x")
    assert result.returncode == 2
    assert "max_connections" in result.stderr and "Traceback" not in result.stderr


def test_an_invalid_dump_is_an_error_at_the_start(tmp_path: Path) -> None:
    """The error has psql's own message and the line of the dump."""
    dump = tmp_path / "bad.sql"
    dump.write_text("CREATE TABLE t (n int);\nINSERT INTO t VALUES ('x');\n")
    port = ports.free_port("127.0.0.1")
    result = run_pgtemp("--load-from", str(dump), f"postgresql://localhost:{port}/x")
    assert result.returncode == 2
    assert "bad.sql:2" in result.stderr and "invalid input syntax" in result.stderr


def test_the_environment_names_the_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    """PGTEMP_URI takes precedence over DATABASE_URL."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    result = run_pgtemp(env={"PGTEMP_URI": "nonsense", "DATABASE_URL": "other"})
    assert "nonsense" in result.stderr
    result = run_pgtemp(env={"DATABASE_URL": "other"})
    assert "other" in result.stderr


def test_settings_and_dump_of_the_original_command_line(
    daemon: type[Daemon], tmp_path: Path, open_dir: Path
) -> None:
    """[--single] [--data-dir-prefix DIR] [--load-from FILE] [-o KEY=VALUE]… URI still works."""
    dump = tmp_path / "dump.sql"
    dump.write_text("CREATE TABLE t AS SELECT 42 AS answer;\n")
    served = daemon(
        "--single", "--data-dir-prefix", str(open_dir), "--load-from", str(dump),
        "-o", "work_mem=9MB", "-o", "max_connections=33", "--dump", str(tmp_path / "out.sql"),
    )  # fmt: skip
    with psycopg.connect(served.uri) as connection:
        assert connection.execute("SELECT answer FROM t").fetchone() == (42,)
        assert connection.execute("SHOW work_mem").fetchone() == ("9MB",)
        assert connection.execute("SHOW max_connections").fetchone() == ("33",)
        row = connection.execute("SHOW data_directory").fetchone()
        assert row is not None and row[0].startswith(str(open_dir))
    assert served.end()[0] == 0
    assert "42" in (tmp_path / "out.sql").read_text()


def test_help_explains_how_to_start() -> None:
    """`pgtemp --help` shows how to start; the help of a command shows every option."""
    assert "pgtemp postgresql://localhost:6543/mytestdb" in run_pgtemp("--help").stdout
    output = run_pgtemp("serve", "--help").stdout
    assert "--data-dir-prefix" in output and "PGTEMP_VERSION" in output
    assert run_pgtemp("--version").stdout.startswith("pgtemp, version ")


@pytest.mark.parametrize(
    "error",
    [ClusterError("c\x1b]0;x\x07", remedy="r", details=["a\x1b[2J", "b\tc"]), OSError("\x1b[")],
)
def test_control_characters_are_escaped_in_errors(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tenant may write anything to a server's log. An error quotes the log line by line."""

    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "main", fail)
    assert main._run() == 2
    output = capsys.readouterr().err
    assert output.replace("\n", "").isprintable()
    assert "\\x1b[" in output
    if isinstance(error, ClusterError):
        assert output.splitlines()[1].strip() == "a\\x1b[2J"
        assert len(output.splitlines()) == 3


def test_single_and_a_server_for_each_lease() -> None:
    uri = "postgresql://localhost:29391/x"
    check_error("--single", "--isolation", "cluster", uri, word="leave out single or isolation")
