"""pgtemp: the two fixtures have the same names as before, so no test had to change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgtemp import Database, Recipe

HERE = Path(__file__).parent


def add_products(uri: str) -> None:
    with psycopg.connect(uri) as connection:
        connection.execute("INSERT INTO product VALUES (1, 'tea', 2), (2, 'coffee', 3)")


@pytest.fixture(scope="session")
def pgtemp_template() -> Recipe:
    # Cached on disk until the schema or this file changes.
    return Recipe([HERE / "schema.sql", add_products], watch=[__file__])


@pytest.fixture
def postgresql(pgtemp: Database) -> psycopg.Connection[Any]:
    return pgtemp.connect()  # pgtemp closes it with the database


@pytest.fixture
def with_sales(pgtemp_factory: Callable[..., Database]) -> psycopg.Connection[Any]:
    recipe = Recipe([HERE / "schema.sql", add_products, HERE / "sales.sql"], watch=[__file__])
    return pgtemp_factory(template=recipe).connect()
