"""Every test commits customer 1, which works because each has its own database."""

import pytest
from models import Base, Customer
from sqlalchemy import Engine, create_engine, inspect, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from pgtemp import Database


def test_the_migrations_make_what_the_models_say(engine: Engine) -> None:
    with engine.connect() as connection:
        columns = {column["name"] for column in inspect(connection).get_columns("customer")}
    assert columns == set(Base.metadata.tables["customer"].columns.keys())


def test_sync(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Customer(id=1, name="Ada", email="ada@example.org"))
        session.commit()
    with Session(engine) as session:
        assert session.scalars(select(Customer.name)).all() == ["Ada"]


async def test_async(async_engine: AsyncEngine) -> None:
    async with AsyncSession(async_engine) as session:
        session.add(Customer(id=1, name="Grace"))
        await session.commit()
    async with AsyncSession(async_engine) as session:
        assert (await session.scalars(select(Customer.name))).all() == ["Grace"]


@pytest.mark.pgtemp(rollback=True)
@pytest.mark.parametrize("name", ["Edsger", "Barbara"])
def test_rolled_back(pgtemp: Database, name: str) -> None:
    """All connections of the engine are the test's one connection; their commits are undone."""
    engine = create_engine("postgresql+psycopg://", creator=pgtemp.connect)
    with Session(engine) as session:
        session.add(Customer(id=1, name=name))
        session.commit()
    with Session(engine) as session:
        session.add(Customer(id=2, name="nobody"))
        session.flush()
        session.rollback()
    with Session(engine) as session:
        assert session.scalars(select(Customer.name)).all() == [name]
    engine.dispose()
