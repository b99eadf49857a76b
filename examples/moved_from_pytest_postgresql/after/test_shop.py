"""The tests use the same sale numbers and commit; each has its own database."""

from typing import Any

import psycopg
import pytest
from shop import sell, turnover
from sqlalchemy import URL, create_engine, text


def test_one_sale(postgresql: psycopg.Connection[Any]) -> None:
    sell(postgresql, 1, product=1)
    assert turnover(postgresql) == 2


def test_two_sales(postgresql: psycopg.Connection[Any]) -> None:
    sell(postgresql, 1, product=1)
    sell(postgresql, 2, product=2)
    assert turnover(postgresql) == 5


def test_unknown_product(postgresql: psycopg.Connection[Any]) -> None:
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        sell(postgresql, 1, product=99)


def test_by_another_driver(postgresql: psycopg.Connection[Any]) -> None:
    """The URL for another driver is made from the connection's parameters, as is usual."""
    sell(postgresql, 1, product=2)
    info = postgresql.info
    url = URL.create(
        "postgresql+psycopg", info.user, info.password, info.host, info.port, info.dbname
    )
    engine = create_engine(url)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT product FROM sale")).scalar() == 2
    engine.dispose()


def test_both(postgresql: psycopg.Connection[Any], with_sales: psycopg.Connection[Any]) -> None:
    """A test uses two databases; the second one initially contains three sales."""
    sell(with_sales, 4, product=2)
    assert turnover(with_sales) == 10
    assert turnover(postgresql) == 0
