"""Fixtures that run the application on each test's own database."""

import pytest
from app import create_app, init_db
from flask.testing import FlaskClient

from pgtemp import Recipe


@pytest.fixture(scope="session")
def pgtemp_template() -> Recipe:
    return Recipe(init_db, watch=["app.py"])


@pytest.fixture
def client(pgtemp_uri: str) -> FlaskClient:
    return create_app(pgtemp_uri).test_client()
