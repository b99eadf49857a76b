"""The report of a failed test explains the failure, and its database can be opened afterwards."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys

import psycopg
import pytest

from project import Project, Result

FAILS = """
    import psycopg
    import pytest

    def test_passes(pgtemp):
        pgtemp.connect().execute("INSERT INTO account VALUES (7, 7)")

    def test_fails(pgtemp):
        with psycopg.connect(pgtemp.uri) as connection:
            connection.execute("INSERT INTO account VALUES (1, %s)", [100])
            connection.commit()
            with pytest.raises(psycopg.errors.UndefinedTable):
                connection.execute("SELECT * FROM no_such_table")
            connection.rollback()
            assert connection.execute("SELECT balance FROM account").fetchone() == (99,)
"""


def section(result: Result, title: str) -> str:
    """The text of a section of the only report."""
    found = re.search(rf"^-+ {title} -+$\n(.*?)(?=^[-=_]+ )", result.output, re.M | re.S)
    return found[1] if found else ""


def command(result: Result) -> list[str]:
    """The first command that opens persisted data."""
    found = re.search(r"^    (pgtemp open .*)$", result.output, re.M)
    assert found, result.output
    return found[1].split()


def rows_of(argv: list[str], query: str) -> list[tuple[object, ...]]:
    """The result of a query in the server that a command starts."""
    with subprocess.Popen(
        [sys.executable, "-m", *argv], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        try:
            with psycopg.connect(lines[1].strip()) as connection:
                return connection.execute(query).fetchall()  # type: ignore[arg-type]
        finally:
            process.send_signal(signal.SIGINT)
            process.stdout.read()


def test_the_report_of_a_failed_test(persisting: Project) -> None:
    """The command for its database works after pytest has exited. The log is only of this test."""
    result = persisting.run("--pgtemp-log=statements", text=FAILS)
    assert (result.count("failed"), result.count("passed")) == (1, 1)
    assert "pgtemp open" in section(result, "pgtemp: database")
    log = section(result, "pgtemp: server log")
    assert 'relation "no_such_table" does not exist' in log
    assert "account" not in log
    statements = section(result, "pgtemp: statements")
    assert re.search(
        r"^ +\d+\.\d+ ms  INSERT INTO account VALUES .*-- \$1 = '100'", statements, re.M
    )
    assert "VALUES (7, 7)" not in result.output
    assert statements.count("CREATE DATABASE") == 0
    assert list(persisting.persisted_databases().values()) == ["test_it.py::test_fails"]
    assert rows_of(command(result), "SELECT * FROM account") == [(1, 100)]


@pytest.mark.slow
def test_reports_without_statements(persisting: Project) -> None:
    result = persisting.run(text=FAILS)
    assert section(result, "pgtemp: server log")
    assert not section(result, "pgtemp: statements")
    result = persisting.run("--pgtemp-log=none", "--pgtemp-keep=none")
    assert result.count("failed") == 1
    assert "pgtemp:" not in result.output


@pytest.mark.parametrize(
    "keep", ["failed", *(pytest.param(one, marks=pytest.mark.slow) for one in ("all", "none"))]
)
def test_which_databases_are_persisted(persisting: Project, keep: str) -> None:
    text = """
        import pytest

        @pytest.mark.pgtemp(keep=True)
        def test_asks_for_it(pgtemp): pass

        def test_passes(pgtemp): pass

        def test_fails(pgtemp): assert 0

        @pytest.fixture
        def before(pgtemp): raise RuntimeError("before")

        def test_fails_before(before): pass

        @pytest.mark.xfail
        def test_is_expected_to_fail(pgtemp): assert 0

        @pytest.mark.pgtemp(rollback=True)
        def test_rolled_back(pgtemp): assert 0

        @pytest.mark.pgtemp(isolation="cluster")
        def test_server(pgtemp): assert 0

        @pytest.fixture
        def after(pgtemp):
            yield
            raise RuntimeError("after")

        @pytest.mark.pgtemp(keep=True)
        def test_asks_last(pgtemp): pass

        def test_fails_after(after): pass
    """
    result = persisting.run(f"--pgtemp-keep={keep}", text=text)
    kept = {of.partition("::test_")[2] for of in persisting.persisted_databases().values()}
    asked = {"asks_for_it", "asks_last"}
    failed = asked | {"fails", "fails_before", "server", "fails_after"}
    expected = {"failed": failed, "all": failed | {"passes", "is_expected_to_fail"}, "none": asked}
    assert kept == expected[keep], result.output
    assert "INTERNALERROR" not in result.output
    for name in kept:
        assert f"test_it.py::test_{name}\n    pgtemp open" in result.output


def test_the_limit_of_persisted_databases(persisting: Project) -> None:
    text = """
        import pytest

        @pytest.mark.parametrize("n", range(4))
        def test_fails(pgtemp, n): assert 0
    """
    result = persisting.run("--pgtemp-keep-most=2", text=text)
    assert result.count("failed") == 4
    assert len(persisting.persisted_databases()) == 2
    assert (
        result.output.count("not persisted: 2 databases are already persisted (--pgtemp-keep-most)")
        == 2
    )


@pytest.mark.slow
def test_only_databases_of_the_last_runs_stay(persisting: Project) -> None:
    persisting.write("test_it.py", "def test_fails(pgtemp): assert 0")
    seen = [set(persisting.persisted_databases()) for _ in range(5) if persisting.run()]
    assert [len(kept) for kept in seen] == [1, 2, 3, 3, 3]
    assert not seen[0] & seen[4]


def test_connections_that_a_test_leaves_open_are_reported(project: Project) -> None:
    """The report has the application, state and query; the suite does not wait."""
    text = """
        import psycopg

        kept = []

        def test_leaves_a_connection(pgtemp):
            kept.append(psycopg.connect(pgtemp.uri, application_name="shop"))
            kept[0].execute("SELECT 40 + 2")

        def test_leaves_one_by_the_socket(pgtemp):
            directory = pgtemp.server.socket_dir
            kept.append(psycopg.connect(pgtemp.uri, host=str(directory), autocommit=True))

        def test_closes_all(pgtemp):
            for _ in range(5):
                psycopg.connect(pgtemp.uri).close()
            pgtemp.connect()

        def test_of_a_module(pgtemp_module):
            kept.append(psycopg.connect(pgtemp_module.uri, application_name="pool"))
    """
    result = project.run(text=text)
    assert (result.count("passed"), result.count("warnings")) == (4, 3), result.output
    output = " ".join(result.output.split())
    assert "test_it.py::test_leaves_a_connection left 1 connection open to its database" in output
    assert re.search(r"shop: idle in transaction for \d+\.\d s, last query: SELECT 40 \+ 2", output)
    assert "test_leaves_one_by_the_socket left 1 connection open" in output
    assert re.search(r"test_it.py left 1 connection open .* pool: idle for", output)
    assert "test_closes_all" not in output
    result = project.run("-W", "error::pgtemp.PgTempWarning")
    assert (result.count("passed"), result.count("errors")) == (4, 3), result.output
    assert "INTERNALERROR" not in result.output


def test_a_crashed_server_is_reported_with_its_log(project: Project) -> None:
    """The test whose backend was killed shows the reason."""
    text = """
        import os, signal
        import psycopg
        import pytest

        def test_kills_its_backend(pgtemp):
            connection = pgtemp.connect()
            os.kill(connection.info.backend_pid, signal.SIGKILL)
            connection.execute("SELECT 1")
    """
    result = project.run(text=text)
    assert result.count("failed") == 1, result.output
    assert "was terminated by signal 9" in section(result, "pgtemp: server log")


def test_the_build_of_a_template_counts_as_set_up(project: Project) -> None:
    """The time of the build is part of the first test's set-up, and of no other."""
    project.write(
        "conftest.py",
        """
        import threading
        import pytest

        def migrate(uri):
            threading.Event().wait(0.7)

        @pytest.fixture(scope="session")
        def pgtemp_template():
            return migrate
        """,
    )
    text = """
        def test_one(pgtemp): pass
        def test_two(pgtemp): pass
    """
    result = project.run("--durations=0", "-vv", text=text)
    seconds = {
        test: float(time)
        for time, test in re.findall(r"^([\d.]+)s setup +test_it.py::(\w+)", result.output, re.M)
    }
    assert seconds["test_one"] > 0.7 > seconds["test_two"]


@pytest.mark.slow
def test_only_persisted_data_is_removed(persisting: Project) -> None:
    """Other files in the directory stay. A directory that cannot be used does not stop the run."""
    assert persisting.persist_dir is not None
    mine = [persisting.persist_dir / "failed" / name for name in "abcd"]
    mine += [persisting.persist_dir / "pgtemp-failed" / name for name in "abcd"]
    for path in mine:
        path.mkdir(parents=True)
    result = persisting.run(text="def test_fails(pgtemp): assert 0")
    assert result.count("failed") == 1
    assert all(path.is_dir() for path in mine)
    shutil.rmtree(persisting.persist_dir / "pgtemp-failed")
    (persisting.persist_dir / "pgtemp-failed").write_text("")
    result = persisting.run()
    assert result.count("failed") == 1, result.output
    assert "not persisted: " in section(result, "pgtemp: database")


def test_a_test_that_kills_its_server(project: Project) -> None:
    text = """
        import os
        import signal
        import pytest

        @pytest.mark.pgtemp(isolation="cluster")
        def test_it(pgtemp):
            os.kill(pgtemp.server.pid, signal.SIGKILL)
    """
    result = project.run(text=text)
    assert (result.status, result.count("passed")) == (0, 1), result.output
