"""Alembic's environment: the caller passes the URL; otherwise DATABASE_URL is used."""

import os

from alembic import context
from models import Base
from sqlalchemy import create_engine, make_url

uri = context.config.attributes.get("uri") or os.environ["DATABASE_URL"]
engine = create_engine(make_url(uri).set(drivername="postgresql+psycopg"))

with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=Base.metadata)
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
