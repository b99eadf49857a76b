"""Connections to pgtemp's servers do not depend on variables that are set for other servers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import psycopg
import pytest
from psycopg import pq

from pgtemp import Cluster, PgTempDB, aio, libpq

LEADS_ELSEWHERE = {
    "PGHOST": "192.0.2.1",
    "PGHOSTADDR": "192.0.2.1",
    "PGPORT": "1",
    "PGUSER": "nobody",
    "PGPASSWORD": "wrong",
    "PGDATABASE": "nowhere",
    "PGSSLMODE": "require",
    "PGSSLROOTCERT": "system",
    "PGSSLCERTMODE": "require",
    "PGSSLNEGOTIATION": "direct",
    "PGSSLMINPROTOCOLVERSION": "TLSv9",
    "PGGSSENCMODE": "require",
    "PGMINPROTOCOLVERSION": "3.2",
    "PGMAXPROTOCOLVERSION": "9.9",
    "PGCHANNELBINDING": "require",
    "PGREQUIREAUTH": "md5",
    "PGREQUIREPEER": "nobody",
    "PGTARGETSESSIONATTRS": "standby",
    "PGLOADBALANCEHOSTS": "never",
    "PGSERVICE": "no_such_service",
    "PGSERVICEFILE": "/nowhere",
    "PGPASSFILE": "/nowhere",
}
ALL = ",".join(LEADS_ELSEWHERE)


@pytest.fixture(params=[*LEADS_ELSEWHERE, ALL])
def elsewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set one of the variables, or all of them."""
    for name in request.param.split(","):
        monkeypatch.setenv(name, LEADS_ELSEWHERE[name])


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("tcp", [True, False], ids=["tcp", "socket"])
def test_the_library_connects_to_its_own_server(tcp: bool) -> None:
    """PgTempDB, its load and dump programs, and its connection ignore the variables."""
    with PgTempDB(tcp=tcp) as db, db.connect() as connection:
        row = connection.execute("SELECT current_database()").fetchone()
        assert row == (db.dbname,)


@pytest.mark.parametrize("variables", [ALL])
def test_each_kind_of_connection(variables: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections of clones, asynchronous connections, psql and a command of a build."""
    for name in variables.split(","):
        monkeypatch.setenv(name, LEADS_ELSEWHERE[name])

    async def asynchronous() -> tuple[object, ...] | None:
        async with aio.PgTempDB() as db, await db.connect() as connection:
            return await (await connection.execute("SELECT 1")).fetchone()

    assert asyncio.run(asynchronous()) == (1,)
    script = (
        "import os, psycopg; "
        "psycopg.connect(autocommit=True).execute('CREATE TABLE t AS SELECT 1 AS n'); "
        "psycopg.connect(os.environ['DATABASE_URL']).execute('SELECT * FROM t')"
    )
    with Cluster() as cluster:
        template = cluster.template("app", f'cmd:{sys.executable} -c "{script}"')
        for _ in range(3):  # the later connections are opened in advance
            with template.database() as db, db.connect() as connection:
                assert connection.execute("SELECT count(*) FROM t").fetchone() is not None
        with template.database() as db:
            assert "1 row" in db.psql("SELECT 1")


@pytest.mark.parametrize("variables", [ALL])
def test_a_command_gets_variables_that_fit(variables: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pgtemp run` replaces the variables; a driver that reads them connects to the database."""
    for name in variables.split(","):
        monkeypatch.setenv(name, LEADS_ELSEWHERE[name])
    program = "import psycopg; print(psycopg.connect().execute('SELECT 7').fetchone()[0])"
    done = subprocess.run(
        [sys.executable, "-m", "pgtemp", "run", "--", sys.executable, "-c", program],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr


def test_variables_that_describe_the_client_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    """PGAPPNAME and PGOPTIONS are the test's own."""
    monkeypatch.setenv("PGAPPNAME", "the test")
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=1234kB")
    query = "SELECT current_setting('application_name'), current_setting('work_mem')"
    with PgTempDB() as db, db.connect() as connection:
        assert connection.execute(query).fetchone() == ("the test", "1234kB")


def test_arguments_of_the_caller_take_precedence() -> None:
    with PgTempDB() as db:
        with pytest.raises(psycopg.OperationalError, match="SSL"):
            db.connect(sslmode="require")
        with db.connect(dbname="template1") as connection:
            assert connection.info.dbname == "template1"


def test_each_variable_of_libpq_is_known() -> None:
    """Each variable of this libpq describes the client, is always given, or has a default."""
    for option in pq.Conninfo.get_defaults():
        if option.envvar:
            keyword = option.keyword.decode()
            known = option.envvar.decode() in libpq._variables()
            assert known != (keyword in (*libpq._OF_THE_CLIENT, *libpq._ALWAYS_GIVEN))


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSERVICE", "mine")
    with PgTempDB() as db:
        db.connect().close()
    assert os.environ["PGSERVICE"] == "mine"


def test_connections_that_overlap_hide_the_service_until_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The end of one connection's start must not show PGSERVICE to another that is starting."""
    monkeypatch.setenv("PGSERVICE", "no_such_service")
    with libpq._without_service:
        with libpq._without_service:
            assert "PGSERVICE" not in os.environ
        assert "PGSERVICE" not in os.environ
    assert os.environ["PGSERVICE"] == "no_such_service"
