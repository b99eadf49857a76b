"""What a test gets from the fixtures and from the mark."""

from __future__ import annotations

import pytest

from project import Project


def test_each_test_has_its_own_database(project: Project) -> None:
    """By each fixture, sync and async: no test sees the committed data of another."""
    text = """
        import asyncio
        import psycopg
        import pytest

        INSERT = "INSERT INTO account VALUES (1, 100)"
        COUNT = "SELECT count(*) FROM account"

        def used(connection):
            connection.execute(INSERT)
            connection.commit()
            assert connection.execute(COUNT).fetchone() == (1,)

        @pytest.mark.parametrize("n", range(3))
        def test_connect(pgtemp, n):
            with pgtemp.connect() as connection:
                used(connection)

        def test_uri(pgtemp_uri, pgtemp):
            assert pgtemp_uri == pgtemp.uri
            with psycopg.connect(pgtemp_uri) as connection:
                used(connection)

        def test_async(pgtemp):
            async def go():
                connection = await pgtemp.aconnect()
                await connection.execute(INSERT)
                cursor = await connection.execute(COUNT)
                assert await cursor.fetchone() == (1,)
            asyncio.run(go())

        def test_several(pgtemp, pgtemp_factory):
            one, empty = pgtemp_factory(), pgtemp_factory(template=None)
            assert len({pgtemp.dbname, one.dbname, empty.dbname}) == 3
            used(one.connect())
            assert pgtemp.connect().execute(COUNT).fetchone() == (0,)
            assert "account" not in empty.psql(r"\\d")
            assert "account" in one.psql(r"\\d")

        def test_snapshot(pgtemp):
            before = pgtemp.snapshot("before")
            with psycopg.connect(pgtemp.uri) as connection:
                used(connection)
            pgtemp.restore(before)
            assert pgtemp.connect().execute(COUNT).fetchone() == (0,)

        def test_of_a_module(pgtemp_module):
            used(pgtemp_module.connect())

        def test_of_the_same_module(pgtemp_module):
            assert pgtemp_module.connect().execute(COUNT).fetchone() == (1,)

        def test_cluster(pgtemp_cluster, pgtemp):
            assert pgtemp_cluster.info.port == pgtemp.info.port
    """
    result = project.run(text=text)
    assert (result.status, result.count("passed")) == (0, 10), result.output


def test_the_mark(project: Project) -> None:
    """A template, extensions, settings or a server for one test; others are not affected."""
    project.write("shop.sql", "CREATE TABLE item (id int);")
    text = r"""
        import pytest

        def shown(pgtemp, name):
            return pgtemp.connect().execute(f"SHOW {name}").fetchone()[0]

        @pytest.mark.pgtemp(template="shop.sql")
        def test_template(pgtemp):
            assert "item" in pgtemp.psql(r"\d")

        @pytest.mark.pgtemp(template=None)
        def test_empty(pgtemp):
            assert "account" not in pgtemp.psql(r"\d")

        @pytest.mark.pgtemp(extensions=["pg_trgm"])
        def test_extension(pgtemp):
            pgtemp.connect().execute("SELECT similarity('a', 'a') FROM account")

        @pytest.mark.pgtemp(config={"work_mem": "7MB"})
        def test_setting(pgtemp):
            assert shown(pgtemp, "work_mem") == "7MB"
            assert "account" in pgtemp.psql(r"\d")

        @pytest.mark.pgtemp(isolation="cluster")
        @pytest.mark.parametrize("n", range(2))
        def test_server(pgtemp, pgtemp_cluster, n):
            assert pgtemp.info.port != pgtemp_cluster.info.port
            pgtemp.connect(autocommit=True).execute("CREATE ROLE somebody")
            assert "account" in pgtemp.psql(r"\d")

        def test_plain(pgtemp):
            assert shown(pgtemp, "work_mem") == "4MB"

        @pytest.mark.pgtemp(template=None)
        class TestAll:
            def test_of_a_class(self, pgtemp):
                assert "account" not in pgtemp.psql(r"\d")

            @pytest.mark.pgtemp(template="shop.sql")
            def test_of_its_own(self, pgtemp):
                assert "item" in pgtemp.psql(r"\d")
    """
    # A version whose wheel has extensions.
    result = project.run(text=text, PGTEMP_VERSION="18")
    assert (result.status, result.count("passed")) == (0, 9), result.output


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        (
            "tempalte=None",
            "unknown keyword argument tempalte for a test; specify template, isolation",
        ),
        ("isolation='server'", "unknown isolation; specify 'database' or 'cluster'"),
        ("rollback=True, isolation='cluster'", "rollback=True cannot be combined with isolation="),
        ("extensions='vector'", "not a list; specify a list of names"),
        ("extensions=['no_such_thing']", "'no_such_thing' is not installed"),
        ("config={'port': 1}", "the setting port cannot be changed"),
        ("template='nowhere.sql'", "nowhere.sql"),
    ],
)
def test_an_invalid_mark(project: Project, mark: str, message: str) -> None:
    text = f"""
        import pytest

        @pytest.mark.pgtemp({mark})
        def test_it(pgtemp):
            pass
    """
    result = project.run(text=text)
    assert result.count("error") == 1, result.output
    assert message in result.output


def test_rollback(project: Project) -> None:
    """Only the test itself sees its commits, and its errors affect no other test."""
    text = """
        import asyncio
        import psycopg
        import pytest
        import pgtemp as library

        pytestmark = pytest.mark.pgtemp(rollback=True)
        INSERT = "INSERT INTO account (balance) VALUES (1)"

        def count(connection):
            return connection.execute("SELECT count(*) FROM account").fetchone()[0]

        def test_commit(pgtemp):
            with pgtemp.connect() as connection:
                connection.execute(INSERT)
            assert count(pgtemp.connect()) == 1
            pgtemp.connect().rollback()
            assert count(pgtemp.connect()) == 1

        def test_rollback(pgtemp):
            connection = pgtemp.connect()
            assert count(connection) == 0
            connection.execute(INSERT)
            connection.rollback()
            assert count(connection) == 0

        def test_failed_block(pgtemp):
            with pytest.raises(ZeroDivisionError), pgtemp.connect() as connection:
                connection.execute(INSERT)
                1 / 0
            assert count(connection) == 0

        def test_error(pgtemp):
            connection = pgtemp.connect()
            connection.execute(INSERT)
            connection.commit()
            with pytest.raises(psycopg.errors.UndefinedTable):
                connection.execute("SELECT * FROM nothing")
            connection.commit()  # of a transaction that failed: a rollback
            assert count(connection) == 1

        def test_transaction(pgtemp):
            connection = pgtemp.connect()
            with connection.transaction():
                connection.execute(INSERT)
                with pytest.raises(ZeroDivisionError), connection.transaction():
                    connection.execute(INSERT)
                    1 / 0
            connection.rollback()
            assert count(connection) == 1
            connection.execute(INSERT)
            with connection.transaction():
                connection.execute(INSERT)
            connection.rollback()
            assert count(connection) == 1

        def test_autocommit(pgtemp):
            connection = pgtemp.connect(autocommit=True)
            connection.execute(INSERT)
            with pytest.raises(psycopg.errors.UndefinedTable):
                connection.execute("SELECT * FROM nothing")
            assert count(connection) == 1
            connection.autocommit = False
            connection.execute(INSERT)
            with pytest.raises(psycopg.ProgrammingError, match="autocommit"):
                connection.autocommit = True
            connection.rollback()
            assert count(connection) == 1

        def test_other_arguments(pgtemp):
            from psycopg.rows import dict_row
            pgtemp.connect()
            connection = pgtemp.connect(row_factory=dict_row)
            assert connection.execute("SELECT 1 AS n").fetchone() == {"n": 1}
            with pytest.raises(library.PgTempError, match="cannot have another application_name"):
                pgtemp.connect(application_name="x")
            with pytest.raises(library.PgTempError, match="isolation level"):
                connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE

        def test_async(pgtemp):
            async def go():
                async with await pgtemp.aconnect() as connection:
                    await connection.execute(INSERT)
                async with connection.transaction():
                    await connection.execute(INSERT)
                await connection.rollback()
                cursor = await connection.execute("SELECT count(*) FROM account")
                assert await cursor.fetchone() == (2,)
            asyncio.run(go())
            with pytest.raises(library.PgTempError, match="of the other kind"):
                pgtemp.connect()

        def test_sqlalchemy(pgtemp):
            sqlalchemy = pytest.importorskip("sqlalchemy")
            engine = sqlalchemy.create_engine(
                "postgresql+psycopg://", creator=pgtemp.connect, pool_pre_ping=True)
            for expected in (1, 2):
                with engine.begin() as connection:
                    connection.execute(sqlalchemy.text(INSERT))
                with engine.connect() as connection:
                    found = connection.execute(sqlalchemy.text("SELECT count(*) FROM account"))
                    assert found.scalar() == expected

        def test_one_database(pgtemp, record_property):
            assert count(pgtemp.connect()) == 0

        def test_seen_by_another_way(pgtemp):
            with psycopg.connect(pgtemp.uri) as connection:
                connection.execute(INSERT)

        def test_then_a_new_one(pgtemp):
            assert count(pgtemp.connect()) == 0
    """
    result = project.run("-W", "error", text=text)
    assert (result.status, result.count("passed")) == (0, 12), result.output


@pytest.mark.slow
def test_options(project: Project) -> None:
    """The command line takes precedence over the ini file, and that over the environment."""
    project.write(
        "pytest.ini",
        """
        [pytest]
        pgtemp_config =
            work_mem=5MB
            application_name=a b
        pgtemp_version = 17
        pgtemp_template = one.sql
        """,
    )
    project.write("one.sql", "CREATE TABLE one ();")
    project.write("conftest.py", "")
    text = """
        def test_it(pgtemp, request):
            shown = [
                pgtemp.connect().execute(f"SHOW {name}").fetchone()[0]
                for name in ("work_mem", "server_version_num")
            ]
            print("shown", shown[0], shown[1][:2], "one" in pgtemp.psql(r"\\d"))
    """
    result = project.run("-s", text=text, PGTEMP_VERSION="15")
    assert "shown 5MB 17 True" in result.output
    result = project.run("-s", "--pgtemp-version=18", "--pgtemp-config=work_mem=6MB")
    assert "shown 6MB 18 True" in result.output
    for wrong, message in (
        ("--pgtemp-version=99", "99"),
        ("--pgtemp-config=work_mem", "'work_mem' is not NAME=VALUE"),
    ):
        result = project.run(wrong)
        assert result.count("error") == 1, result.output
        assert message in result.output
    project.write("pytest.ini", "[pytest]\npgtemp_log = some")
    result = project.run()
    assert "pgtemp_log = some in the ini file: not an allowed value" in result.output


def test_a_template_that_cannot_be_built_is_built_once(project: Project) -> None:
    """Each test reports the reason; the build does not run again for each."""
    project.write(
        "conftest.py",
        """
        import pytest

        def migrate(uri):
            with open("tries", "a") as file:
                file.write("x")
            raise RuntimeError("no such migration")

        @pytest.fixture(scope="session")
        def pgtemp_template():
            return migrate
        """,
    )
    text = """
        def test_one(pgtemp): pass
        def test_two(pgtemp): pass
    """
    result = project.run(text=text)
    assert result.count("errors") == 2, result.output
    assert result.output.count("RuntimeError: no such migration") >= 2
    assert (project.root / "tries").read_text() == "x"


def test_templates_of_any_kind(project: Project) -> None:
    """A command runs in the suite's directory; coroutine functions, recipes and lists are built."""
    project.write("conftest.py", "")
    project.write("table.sql", "CREATE TABLE from_sql ();")
    text = r"""
        import sys
        import psycopg
        import pytest
        from pgtemp import Recipe

        async def build(uri):
            async with await psycopg.AsyncConnection.connect(uri) as connection:
                await connection.execute("CREATE TABLE from_coroutine ()")

        COMMAND = "cmd:psql -X -q $DATABASE_URL -f table.sql"
        KINDS = [COMMAND, build, Recipe(build, key="1"), ["table.sql", build]]

        @pytest.mark.parametrize("kind", range(4))
        def test_it(pgtemp_factory, kind):
            tables = pgtemp_factory(template=KINDS[kind]).psql(r"\d")
            assert ("from_sql" in tables) == (kind in (0, 3))
            assert ("from_coroutine" in tables) == (kind in (1, 2, 3))
    """
    project.write("test_it.py", text)
    result = project.run(str(project.root), "--rootdir", str(project.root))
    assert (result.status, result.count("passed")) == (0, 4), result.output


def test_an_unused_plugin_does_nothing(project: Project) -> None:
    """It does not import psycopg, and prints nothing."""
    text = """
        import sys

        def test_it():
            heavy = {"psycopg", "asyncio", "pgtemp.cluster", "pgtemp.server", "uvloop", "rich"}
            assert not heavy & set(sys.modules) - {"asyncio"}
    """
    project.write("conftest.py", "")
    result = project.run(text=text)
    assert (result.status, result.count("passed")) == (0, 1), result.output
    assert "pgtemp:" not in result.output


def test_overrides_in_directories(project: Project) -> None:
    """Each directory has its own template, as with any fixture."""
    for name in ("a", "b"):
        (project.root / name).mkdir()
        project.write(
            f"{name}/conftest.py",
            f"""
            import pytest

            @pytest.fixture(scope="session")
            def pgtemp_template():
                return "{name}.sql"
            """,
        )
        project.write(f"{name}.sql", f"CREATE TABLE from_{name} ();")
        project.write(
            f"{name}/test_{name}.py",
            f"""
            def test_it(pgtemp):
                assert "from_{name}" in pgtemp.psql(r"\\d")
            """,
        )
    result = project.run()
    assert (result.status, result.count("passed")) == (0, 2), result.output


def test_callables_of_one_name_are_different_templates(project: Project) -> None:
    """Two closures; their templates are cached for the run, and each test has its own server."""
    text = """
        import psycopg
        import pytest

        def schema(name):
            def build(uri):
                with psycopg.connect(uri) as connection:
                    connection.execute(f"CREATE TABLE {name} ()")
            return build

        @pytest.mark.pgtemp(isolation="cluster", template=schema("one"))
        def test_one(pgtemp):
            assert "one" in pgtemp.psql(r"\\d")

        @pytest.mark.pgtemp(isolation="cluster", template=schema("two"))
        def test_two(pgtemp):
            assert "two" in pgtemp.psql(r"\\d")
    """
    result = project.run(text=text)
    assert (result.status, result.count("passed")) == (0, 2), result.output


def test_a_database_whose_rollback_is_incomplete_is_dropped(project: Project) -> None:
    """After a real COMMIT or psql, the database is dropped.

    Two databases of a test are separate.
    """
    text = """
        import psycopg
        import pytest

        pytestmark = pytest.mark.pgtemp(rollback=True)
        INSERT = "INSERT INTO account VALUES (1, 1)"

        def count(pgtemp):
            return pgtemp.connect().execute("SELECT count(*) FROM account").fetchone()[0]

        def test_commits_for_real(pgtemp):
            pgtemp.connect().execute(INSERT)
            pgtemp.connect().execute("COMMIT")

        def test_psql(pgtemp):
            assert count(pgtemp) == 0
            pgtemp.psql(INSERT)

        def test_two(pgtemp_factory):
            one, two = pgtemp_factory(), pgtemp_factory()
            assert one.dbname != two.dbname
            for db in (one, two):
                assert count(db) == 0
                db.connect().execute(INSERT)

        def test_close_forgets(pgtemp):
            connection = pgtemp.connect()
            connection.execute(INSERT)
            connection.close()
            assert count(pgtemp) == 0
            connection.rollback()
            assert pgtemp.connect(autocommit=True).autocommit
            pgtemp.connect().execute(INSERT)
            pgtemp.connect().rollback()
            assert count(pgtemp) == 0

        def test_after_them(pgtemp):
            assert count(pgtemp) == 0
    """
    result = project.run(text=text)
    assert (result.status, result.count("passed")) == (0, 5), result.output


def test_connections_opened_in_advance_match_the_environment(project: Project) -> None:
    """They do not have an earlier test's environment, or settings from before a change."""
    text = """
        import pytest

        def shown(pgtemp, name):
            return pgtemp.connect().execute(f"SHOW {name}").fetchone()[0]

        @pytest.mark.parametrize("n", range(3))
        def test_plain(pgtemp, n):
            assert shown(pgtemp, "statement_timeout") == "0"

        @pytest.mark.parametrize("n", range(3))
        def test_variable(pgtemp, monkeypatch, n):
            monkeypatch.setenv("PGOPTIONS", "-c statement_timeout=12345ms")
            assert shown(pgtemp, "statement_timeout") == "12345ms"

        @pytest.mark.parametrize("n", range(3))
        def test_setting(pgtemp, n):
            assert shown(pgtemp, "statement_timeout") == "0"
            pgtemp.psql(f'ALTER DATABASE "{pgtemp.dbname}" SET work_mem = "7MB"')
            assert shown(pgtemp, "work_mem") == "7MB"

        @pytest.mark.parametrize("n", range(3))
        def test_alone(pgtemp, n):
            with pgtemp.connect():
                pass
            pgtemp.snapshot("s")
    """
    result = project.run(text=text)
    assert (result.status, result.count("passed")) == (0, 12), result.output
