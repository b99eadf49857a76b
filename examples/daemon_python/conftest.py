"""DATABASE_URL names a daemon. The project itself does not use pgtemp: see README.md."""

import os
import uuid

import pytest


@pytest.fixture
def uri() -> str:
    """Return a URL; each connection to it gets a database of its own."""
    return os.environ["DATABASE_URL"]


@pytest.fixture
def new_session(uri: str):
    """Return a function that returns new URLs; all connections to one URL share one database."""
    return lambda: f"{uri}~{uuid.uuid4().hex}"


@pytest.fixture
def session(new_session) -> str:
    return new_session()
