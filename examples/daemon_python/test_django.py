"""Django with its own engine and pool, and pytest-django."""

import contextlib
import uuid
from collections.abc import Iterator

import psycopg
import pytest
from django.core.management import call_command
from django.db import IntegrityError, OperationalError, connection, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from library.models import Reader

COUNT = "SELECT count(*) FROM library_reader"


@pytest.fixture(scope="session")
def django_db_setup(django_db_blocker) -> Iterator[None]:
    """Migrate a session once per run; pytest-django's fixture would create a database test_app."""
    connection.settings_dict["NAME"] += f"~{uuid.uuid4().hex}"
    with django_db_blocker.unblock():
        call_command("migrate", verbosity=0)
        yield
        connection.close()
        connection.close_pool()


@contextlib.contextmanager
def another(name: str | None = None) -> Iterator[BaseDatabaseWrapper]:
    """Return another connection of the pool, or one of a new pool for the database `name`."""
    copy = connection.copy(alias=name)
    if name is not None:
        copy.settings_dict["NAME"] = name
    try:
        yield copy
    finally:
        copy.close()
        if name is not None:
            copy.close_pool()


def value(of: BaseDatabaseWrapper, query: str) -> object:
    with of.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchone()[0]


@pytest.mark.django_db
@pytest.mark.parametrize("number", [1, 2])
def test_each_test_starts_with_no_reader(number: int) -> None:
    """pytest-django rolls back the transaction of each test, here as usual."""
    Reader.objects.create(name="Ann")
    assert Reader.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_each_connection_has_its_own_database(uri: str) -> None:
    name = uri.rpartition("/")[2]
    with another(name) as first, another(name) as second, first.cursor() as cursor:
        cursor.execute("CREATE TABLE mine (n int)")
        assert value(first, "SELECT to_regclass('mine') IS NOT NULL")
        assert value(second, "SELECT to_regclass('mine') IS NULL")


@pytest.mark.django_db(transaction=True)
def test_a_pool_shares_the_database_of_its_session() -> None:
    Reader.objects.create(name="Ann")
    with another() as one, another() as two, another() as three:
        pids = {value(each, "SELECT pg_backend_pid()") for each in (connection, one, two, three)}
        assert len(pids) == 4
        assert [value(each, COUNT) for each in (one, two, three)] == [1, 1, 1]


@pytest.mark.django_db(transaction=True)
def test_two_sessions_do_not_see_each_other(session: str) -> None:
    with another(session.rpartition("/")[2]) as other, other.cursor() as cursor:
        cursor.execute("CREATE TABLE mine (n int)")
        assert value(connection, "SELECT to_regclass('mine') IS NULL")


@pytest.mark.django_db
def test_cancelled() -> None:
    Reader.objects.create(name="Ann")
    cancelled = pytest.raises(OperationalError)
    with cancelled as caught, transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET LOCAL statement_timeout = 200")
        cursor.execute("SELECT pg_sleep(60)")
    assert isinstance(caught.value.__cause__, psycopg.errors.QueryCanceled)
    assert Reader.objects.count() == 1  # back at the savepoint, in the same transaction


@pytest.mark.django_db
def test_an_error_keeps_its_sqlstate() -> None:
    Reader.objects.create(name="Ann")
    with pytest.raises(IntegrityError) as caught, transaction.atomic():
        Reader.objects.create(name="Ann")
    assert caught.value.__cause__.sqlstate == "23505"
