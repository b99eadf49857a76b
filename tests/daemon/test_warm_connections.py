"""Warm connections: their state when a client gets one, and that clients do not notice them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest

from support import Daemon, at, eventually, one

DaemonType = type[Daemon]
BOTH = pytest.mark.parametrize("isolation", ["database", "cluster"])


def test_a_warm_connection_has_the_settings_its_client_requested(daemon: DaemonType) -> None:
    """Clients of several kinds connect often enough to get warm connections.

    Settings, user, cancel requests and database are right.
    """
    served = daemon("--log-level", "debug")
    kinds = [
        ("postgres", "application_name=a", ("a", "4MB", "UTF8")),
        ("postgres", "application_name=b", ("b", "4MB", "UTF8")),
        ("postgres", "options=-c%20work_mem%3D5MB", ("", "5MB", "UTF8")),
        ("me", "client_encoding=LATIN1", ("", "4MB", "LATIN1")),
    ]
    pids, names = set(), set()
    for _ in range(5):
        for user, parameters, expected in kinds:
            with psycopg.connect(
                f"{at(served, 'test', user)}?{parameters}", autocommit=True
            ) as connection:
                row = connection.execute(
                    "SELECT current_user, current_setting('application_name'),"
                    " current_setting('work_mem'), current_setting('client_encoding'),"
                    " pg_backend_pid(), current_database()"
                ).fetchone()
                assert row is not None
                assert row[:4] == (user, *expected)
                pids.add(row[4])
                names.add(row[5])
                with ThreadPoolExecutor(1) as thread:
                    asleep = thread.submit(connection.execute, "SELECT pg_sleep(60)")
                    activity = Path(f"/proc/{row[4]}/cmdline")
                    assert eventually(lambda a=activity: b"SELECT" in a.read_bytes())  # type: ignore[misc]
                    connection.cancel_safe()
                    with pytest.raises(psycopg.errors.QueryCanceled):
                        asleep.result(30)
    assert len(pids) == len(names) == 20


WATCHED = {
    "pg_stat_statements": (["-o", "shared_preload_libraries=pg_stat_statements"], ""),
    "durations": (["-o", "log_min_duration_statement=0"], ""),
    "durations, by the client": ([], " --LOG-min-duration-statement=0"),
    "statements": (["-o", "log_statement=all"], ""),
    "debug messages, by the client": ([], " -d 2"),
    "auto_explain": (["-o", "session_preload_libraries=auto_explain"], ""),
    "auto_explain, by the client": ([], " -c session_preload_libraries=auto_explain"),
}


@BOTH
@pytest.mark.parametrize("by", WATCHED)
def test_statement_logging_shows_only_the_clients_statements(
    daemon: DaemonType, isolation: str, by: str
) -> None:
    """The statement that is planned in a warm connection is neither recorded nor logged."""
    arguments, options = WATCHED[by]
    served = daemon("--isolation", isolation, *arguments)
    options = (
        "-c auto_explain.log_min_duration=0 -c auto_explain.log_nested_statements=on" + options
    )

    def is_warm() -> bool:
        begun = time.time()
        with psycopg.connect(served.uri, options=options, autocommit=True) as connection:
            row = connection.execute(
                "SELECT backend_start < to_timestamp(%s), datname FROM pg_stat_activity"
                " WHERE pid = pg_backend_pid()", [begun],
            ).fetchone()  # fmt: skip
            if by == "pg_stat_statements":
                connection.execute("CREATE EXTENSION pg_stat_statements")
                seen = connection.execute(
                    "SELECT string_agg(query, '') FROM pg_stat_statements s"
                    " JOIN pg_database d ON d.oid = s.dbid WHERE datname = current_database()"
                ).fetchone()
            else:
                data = connection.execute("SHOW data_directory").fetchone()
                assert data is not None
                seen = ((Path(data[0]).parent / "server.log").read_text(),)
        assert row is not None and seen is not None
        assert "pg_stat_activity" in seen[0]  # the client's own statement
        assert "pg_catalog.pg_seclabel" not in seen[0]
        return bool(row[0])

    assert eventually(is_warm)


def test_a_login_error_reaches_the_client_each_time(daemon: DaemonType) -> None:
    """No warm connection is opened for such a login; the client gets the server's own error."""
    served = daemon()
    for _ in range(4):
        with pytest.raises(
            psycopg.OperationalError, match='invalid value for parameter "work_mem"'
        ):
            psycopg.connect(at(served, "test") + "?options=-c%20work_mem%3Dnone")
    assert one(at(served, "test"), "SELECT 1") == 1


SEEN = (
    "SELECT count(*) FROM pg_get_backend_memory_contexts() WHERE ident = 't_n_idx'"  # in its caches
)


def first_value(
    served: Daemon, statement: LiteralString, values: list[object] | None = None
) -> object:
    """The first value of the first statement of a client, in a transaction."""
    with psycopg.connect(at(served, "t", "me")) as connection:
        row = connection.execute(statement, values).fetchone()
        assert row is not None
        return row[0]


def is_doing(what: str, user: str = "me") -> bool:
    """Whether a connection of a user has this activity in its process title."""
    titles = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            titles.append(place.read_text(errors="replace"))
    return any(f" {user} " in title and title.rstrip("\0 ").endswith(what) for title in titles)


@BOTH
@pytest.mark.parametrize(
    "begun", [("SELECT count(*) FROM t", None), ("SELECT count(*) FROM t WHERE n = %s", [1])]
)
def test_the_first_statement_of_earlier_clients_is_planned(
    daemon: DaemonType, isolation: str, begun: tuple[LiteralString, list[object] | None]
) -> None:
    """Two clients in a row begin with the same statement.

    The third finds its table in the backend's caches.
    """
    served = daemon("--isolation", isolation, "--pool", "1")
    with psycopg.connect(at(served, "t~template")) as connection:
        connection.execute("CREATE TABLE t (n int)")
        connection.execute("CREATE INDEX ON t (n)")

    def is_planned(*beginnings: tuple[LiteralString, list[object] | None]) -> bool:
        for statement, values in 2 * beginnings:
            assert first_value(served, statement, values) == 0
        assert eventually(lambda: is_doing("idle"))
        return first_value(served, SEEN) == 1

    assert eventually(lambda: is_planned(begun))
    other: tuple[LiteralString, None] = ("SELECT 0", None)
    assert not any(is_planned(begun, other) for _ in range(5))


def test_a_statement_that_cannot_be_planned_is_not_planned_again(daemon: DaemonType) -> None:
    """The error affects one client; warm connections are still opened for similar clients.

    The server log has the error once per client, and at most once from planning.
    """
    served = daemon("--pool", "1")
    attempts = 12
    for _ in range(attempts):
        with pytest.raises(psycopg.errors.UndefinedTable):
            first_value(served, "SELECT FROM missing")

    def is_warm_connection() -> bool:
        begun = time.time()
        return bool(
            first_value(
                served,
                "SELECT backend_start < to_timestamp(%s) FROM pg_stat_activity"
                " WHERE pid = pg_backend_pid()",
                [begun],
            )
        )

    assert eventually(is_warm_connection)
    log = Path(str(first_value(served, "SHOW data_directory"))).parent / "server.log"
    assert attempts <= log.read_text().count('relation "missing" does not exist') <= attempts + 1


@BOTH
def test_functions_that_the_planner_calls_leave_nothing(daemon: DaemonType, isolation: str) -> None:
    """Stable functions may set or write something; the next client does not see it."""
    served = daemon("--isolation", isolation, "--pool", "1")
    with psycopg.connect(at(served, "t~template")) as connection:
        connection.execute(
            """
            CREATE TABLE t (n text);
            CREATE INDEX ON t (n);
            CREATE FUNCTION sets() RETURNS text STABLE LANGUAGE plpgsql AS $$
            BEGIN RETURN set_config('my.own', 'set', false); END $$;
            """
        )

    def is_planned() -> bool:
        for _ in range(2):
            assert first_value(served, "SELECT count(*) FROM t WHERE n = sets()") == 0
        assert eventually(lambda: is_doing("idle"))
        with psycopg.connect(at(served, "t", "me")) as connection:
            assert connection.execute("SELECT current_setting('my.own', true)").fetchone() in (
                (None,), ("",),
            )  # fmt: skip
            return connection.execute(SEEN).fetchone() == (1,)

    assert eventually(is_planned)


def test_planning_that_takes_too_long_is_canceled(daemon: DaemonType) -> None:
    """Then warm connections are opened again, and no client gets the database of that planning."""
    served = daemon("--pool", "1")
    with psycopg.connect(at(served, "t~template")) as connection:
        connection.execute(
            """
            CREATE FUNCTION sleeps() RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$
            BEGIN PERFORM pg_sleep(600); RETURN 1; END $$;
            """
        )
    for _ in range(2):
        with psycopg.connect(at(served, "t", "me")) as client, ThreadPoolExecutor(1) as thread:
            asleep = thread.submit(client.execute, "SELECT sleeps()")
            assert eventually(lambda: is_doing("SELECT"))
            client.cancel_safe()
            with pytest.raises(psycopg.errors.QueryCanceled):
                asleep.result(30)
    assert eventually(lambda: is_doing("BIND"))
    assert eventually(lambda: is_doing("idle") or first_value(served, "SELECT 0") != 0)
    assert eventually(lambda: not is_doing("BIND"))
