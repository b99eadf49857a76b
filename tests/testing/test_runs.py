"""Whole pytest runs: in several processes, interrupted, killed, together with other plugins."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest

from project import Project
from support import children, eventually, homes

XDIST = ["pgtemp.pytest_plugin", "xdist"]
SLOW_BUILD = """
    import os
    import psycopg
    import pytest

    def migrate(uri):
        with open("builds", "a") as file:
            file.write("x")
        with psycopg.connect(uri) as connection:
            connection.execute("CREATE TABLE account (id int PRIMARY KEY)")

    @pytest.fixture(scope="session")
    def pgtemp_template():
        return migrate
"""
MANY = """
    import psycopg
    import pytest

    @pytest.mark.parametrize("n", range(16))
    def test_it(pgtemp, pgtemp_cluster, n):
        with pgtemp.connect() as connection:
            connection.execute("INSERT INTO account VALUES (1)")
        print("port", pgtemp_cluster.info.port)
"""


def images() -> set[str]:
    return {path.name for path in Path(os.environ["PGTEMP_CACHE_DIR"], "images").glob("*-run-*")}


def test_workers_share_a_template_that_one_has_built(project: Project) -> None:
    """One server per worker and one build; its image is removed after the run."""
    project.plugins = XDIST
    project.write("conftest.py", SLOW_BUILD)
    before, built = homes(), images()
    result = project.run("-n", "4", "-rP", text=MANY)
    assert (result.status, result.count("passed")) == (0, 16), result.output
    ports = {line for line in result.output.splitlines() if line.startswith("port ")}
    assert len(ports) == 4
    assert (project.root / "builds").read_text() == "x"
    assert images() == built
    assert eventually(lambda: homes() <= before)


@pytest.mark.slow
def test_workers_that_stop_early_leave_nothing(project: Project) -> None:
    project.plugins = XDIST
    before, built = homes(), images()
    text = MANY + '\n        assert n % 2, "odd"\n'
    result = project.run("-n", "4", "--maxfail", "2", "--pgtemp-keep=none", text=text)
    assert result.count("failed") >= 2, result.output
    assert images() == built
    assert eventually(lambda: homes() <= before)


@pytest.mark.slow
def test_databases_of_failed_tests_of_all_workers_are_persisted(persisting: Project) -> None:
    persisting.plugins = XDIST
    text = """
        import pytest

        @pytest.mark.parametrize("n", range(4))
        def test_fails(pgtemp, n): assert 0
    """
    result = persisting.run("-n", "2", text=text)
    assert result.count("failed") == 4
    assert len(persisting.persisted_databases()) == 4, result.output
    assert result.output.count("test_fails[0]\n    pgtemp open") == 1


def test_a_pytest_process_started_by_a_worker(project: Project) -> None:
    """It inherits the variables of xdist."""
    text = "def test_it(pgtemp): pass"
    result = project.run(text=text, PYTEST_XDIST_WORKER="gw0", PYTEST_XDIST_TESTRUNUID="x")
    assert (result.status, result.count("passed")) == (0, 1), result.output


WAITS = """
    import pathlib
    import signal
    import pytest

    @pytest.mark.parametrize("n", range(8))
    def test_it(pgtemp, n):
        connection = pgtemp.connect()
        pathlib.Path(f"started{n}").touch()
        connection.execute("SELECT pg_sleep(60)")
"""


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_leaves_nothing(project: Project, workers: int) -> None:
    """A terminal sends it to all processes."""
    project.plugins = XDIST
    project.write("test_it.py", WAITS)
    before, built = homes(), images()
    argv = project.argv(*(["-n", str(workers)] if workers else []))
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(project.root)
        os.execve(argv[0], argv, project.environment)
    started = max(1, workers)
    assert eventually(lambda: len(list(project.root.glob("started*"))) >= started, 60)
    os.write(terminal, b"\x03")
    output = b""
    try:
        while chunk := os.read(terminal, 1000):
            output += chunk
    except OSError:  # the other end of the terminal is closed
        pass
    os.close(terminal)
    os.waitpid(pid, 0)
    assert b"KeyboardInterrupt" in output
    assert eventually(lambda: homes() <= before)
    assert eventually(lambda: images() == built)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["all", "a worker"])
def test_killed_processes_leave_nothing(project: Project, killed: str) -> None:
    """The supervisors of killed workers stop their servers; the other worker continues."""
    project.plugins = XDIST
    project.write("test_it.py", WAITS.replace("60", "1"))
    before, built = homes(), images()
    process = subprocess.Popen(
        project.argv("-n", "2", "--max-worker-restart=0"),
        cwd=project.root,
        env=project.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout:
        assert eventually(lambda: len(list(project.root.glob("started*"))) >= 2, 60)
        workers = [pid for pid, name in children(process.pid).items() if "python" in name]
        assert len(workers) == 2
        if killed == "all":
            process.kill()
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
        else:
            os.kill(workers[0], signal.SIGKILL)
        output = process.stdout.read()
    if killed == "a worker":
        assert "crashed" in output
        assert "passed" in output
        assert images() == built
    assert eventually(lambda: homes() <= before)


@pytest.mark.slow
def test_together_with_other_plugins(project: Project) -> None:
    """With pytest-asyncio, pytest-randomly, xdist, pytest-postgresql and pytest-django loaded."""
    project.write(
        "pytest.ini",
        """
        [pytest]
        asyncio_mode = strict
        asyncio_default_fixture_loop_scope = function
        DJANGO_SETTINGS_MODULE = project_settings
        """,
    )
    project.write(
        "project_settings.py",
        """
        import pgtemp.django
        SECRET_KEY = "x"
        INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth"]
        DATABASES = pgtemp.django.databases(
            {"default": {"ENGINE": "django.db.backends.postgresql", "NAME": "shop"}})
        """,
    )
    text = """
        import asyncpg
        import psycopg
        import pytest
        import pytest_asyncio

        INSERT = "INSERT INTO account VALUES (1, 1)"

        @pytest_asyncio.fixture
        async def pool(pgtemp_uri):
            async with asyncpg.create_pool(pgtemp_uri, min_size=1) as pool:
                yield pool

        @pytest.mark.asyncio
        async def test_asyncio(pool):
            await pool.execute(INSERT)

        @pytest.mark.anyio
        @pytest.mark.parametrize("anyio_backend", ["asyncio"])
        async def test_anyio(pgtemp, anyio_backend):
            connection = await pgtemp.aconnect()
            await connection.execute(INSERT)

        @pytest.mark.parametrize("n", range(4))
        def test_sync(pgtemp, n):
            with pgtemp.connect() as connection:
                connection.execute(INSERT)

        @pytest.mark.django_db
        def test_django(pgtemp):
            from django.contrib.auth.models import Permission
            assert Permission.objects.count() > 0
            pgtemp.connect().execute(INSERT)
    """
    project.plugins = [
        *("pgtemp.pytest_plugin", "pytest_asyncio.plugin", "anyio", "xdist", "pytest_randomly"),
        *("pytest_django.plugin", "pytest_postgresql.plugin"),
    ]
    for arguments in (["-W", "error"], ["-n", "2"]):
        result = project.run(*arguments, text=text)
        assert (result.status, result.count("passed")) == (0, 7), result.output


@pytest.mark.slow
def test_the_second_run_of_a_suite_uses_the_cache(project: Project) -> None:
    """A template that is cached by its key or its files is not built again."""
    keyed = SLOW_BUILD.replace("return migrate", "return Recipe(migrate, key='1')")
    project.write("conftest.py", keyed.replace("import os", "from pgtemp import Recipe"))
    for _ in range(2):
        result = project.run(text=MANY)
        assert result.count("passed") == 16, result.output
    assert (project.root / "builds").read_text() == "x"
    project.write("migration.py", "")
    project.write("pytest.ini", "[pytest]\npgtemp_watch = migr*.py")
    project.write("conftest.py", SLOW_BUILD)
    for content, builds in (("1", "xx"), ("1", "xx"), ("2", "xxx")):
        (project.root / "migration.py").write_text(content)
        assert project.run().count("passed") == 16
        assert (project.root / "builds").read_text() == builds
