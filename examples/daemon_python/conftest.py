"""DATABASE_URL leads to a daemon, which has all there is of pgtemp here: see README.md."""

import os
import uuid

import pytest


@pytest.fixture
def uri() -> str:
    """Each connection to it gets a database of its own."""
    return os.environ["DATABASE_URL"]


@pytest.fixture
def new_session(uri: str):
    """Gives URLs; all connections to one of them share one database."""
    return lambda: f"{uri}~{uuid.uuid4().hex}"


@pytest.fixture
def session(new_session) -> str:
    return new_session()
