"""SQLAlchemy: models and a QueuePool, with psycopg as the driver."""

from collections.abc import Callable, Iterator

import psycopg
import pytest
from sqlalchemy import Engine, QueuePool, create_engine, func, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    pass


class Book(Base):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(unique=True)


COUNT = select(func.count()).select_from(Book)


@pytest.fixture
def engine_at() -> Iterator[Callable[..., Engine]]:
    """Return a function that returns engines with a pool; the fixture disposes of them."""
    made: list[Engine] = []

    def make(uri: str, **options: object) -> Engine:
        url = make_url(uri).set(drivername="postgresql+psycopg")
        made.append(create_engine(url, poolclass=QueuePool, pool_size=4, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.dispose()


def test_each_connection_has_its_own_database(uri: str, engine_at) -> None:
    engine = engine_at(uri)
    with engine.connect() as first, engine.connect() as second:
        first.execute(text("INSERT INTO book (title) VALUES ('one')"))
        first.commit()
        assert (first.scalar(COUNT), second.scalar(COUNT)) == (1, 0)


def test_a_pool_shares_the_database_of_its_session(session: str, engine_at) -> None:
    engine = engine_at(session)
    with Session(engine) as work:
        work.add(Book(title="one"))
        work.commit()
    connections = [engine.connect() for _ in range(4)]
    assert [connection.scalar(COUNT) for connection in connections] == [1, 1, 1, 1]
    for connection in connections:
        connection.close()
    assert engine.pool.checkedin() == 4


def test_two_sessions_do_not_see_each_other(new_session, engine_at) -> None:
    one, other = engine_at(new_session()), engine_at(new_session())
    with Session(one) as work:
        work.add(Book(title="one"))
        work.commit()
    with Session(one) as here, Session(other) as there:
        assert (here.scalar(COUNT), there.scalar(COUNT)) == (1, 0)


def test_cancelled(uri: str, engine_at) -> None:
    engine = engine_at(uri, connect_args={"options": "-c statement_timeout=200ms"})
    with engine.connect() as connection:
        connection.execute(text("INSERT INTO book (title) VALUES ('one')"))
        connection.commit()
        with pytest.raises(OperationalError) as caught:
            connection.execute(text("SELECT pg_sleep(60)"))
        assert isinstance(caught.value.orig, psycopg.errors.QueryCanceled)
        connection.rollback()
        assert connection.scalar(COUNT) == 1  # on the same connection, in the same database


def test_an_error_keeps_its_sqlstate(session: str, engine_at) -> None:
    with Session(engine_at(session)) as work:
        work.add_all([Book(title="one"), Book(title="one")])
        with pytest.raises(IntegrityError) as caught:
            work.commit()
        assert caught.value.orig.sqlstate == "23505"
