"""Templates built by common migration tools, in Python and in other languages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import psycopg
import pytest

from pgtemp import Cluster
from support import Daemon

pytestmark = pytest.mark.slow
TABLES = "SELECT string_agg(tablename, ' ' ORDER BY 1) FROM pg_tables WHERE schemaname = 'public'"


def tables(uri: str) -> str:
    with psycopg.connect(uri) as connection:
        row = connection.execute(TABLES).fetchone()
        assert row is not None
        return str(row[0])


def run(*argv: str | Path, cwd: Path, **env: str) -> str:
    result = subprocess.run(
        argv, cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, **env}, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def alembic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with two migrations, which is the test's working directory."""
    (tmp_path / "migrations" / "versions").mkdir(parents=True)
    (tmp_path / "alembic.ini").write_text("[alembic]\nscript_location = migrations\n")
    (tmp_path / "migrations" / "env.py").write_text(
        dedent("""
            import os
            from alembic import context
            from sqlalchemy import create_engine

            url = os.environ["DATABASE_URL"].replace("postgresql://", "postgresql+psycopg://")
            with create_engine(url).connect() as connection:
                context.configure(connection=connection)
                with context.begin_transaction():
                    context.run_migrations()
        """)
    )
    for number in (1, 2):
        (tmp_path / "migrations" / "versions" / f"{number}.py").write_text(
            dedent(f"""
                from alembic import op
                from sqlalchemy import Column, Integer

                revision = "{number}"
                down_revision = {"None" if number == 1 else "'1'"}

                def upgrade():
                    op.create_table("t{number}", Column("n", Integer))
            """)
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_alembic(alembic: Path, daemon: type[Daemon]) -> None:
    """By a command in the library, by one on the daemon's command line, and through the URL."""
    migrate = f"{sys.executable} -m alembic upgrade head"
    with Cluster() as cluster:
        app = cluster.template("app", f"cmd:{migrate}", watch=["migrations/**/*.py"])
        with app.database() as db:
            assert tables(db.uri) == "alembic_version t1 t2"
    served = daemon("--template", f"app=cmd:{migrate}", "--watch", "app=migrations/**/*.py")
    assert tables(served.uri.replace("/test", "/app")) == "alembic_version t1 t2"
    url = served.uri.replace("/test", "/live~template")
    run(sys.executable, "-m", "alembic", "upgrade", "1", cwd=alembic, DATABASE_URL=url)
    run(sys.executable, "-m", "alembic", "upgrade", "head", cwd=alembic, DATABASE_URL=url)
    assert tables(served.uri.replace("/test", "/live")) == "alembic_version t1 t2"


@pytest.fixture
def django(tmp_path: Path) -> Path:
    """A project with a model, a migration and a test."""
    (tmp_path / "shop" / "migrations").mkdir(parents=True)
    for name in ("shop/__init__.py", "shop/migrations/__init__.py"):
        (tmp_path / name).touch()
    (tmp_path / "settings.py").write_text(
        dedent("""
            import os

            INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "shop"]
            DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
            SECRET_KEY = "x"
            DATABASES = {
                "default": {
                    "ENGINE": "django.db.backends.postgresql",
                    "HOST": os.environ["PGHOST"],
                    "PORT": os.environ["PGPORT"],
                    "USER": os.environ["PGUSER"],
                    "PASSWORD": os.environ.get("PGPASSWORD", ""),
                    "NAME": os.environ["PGDATABASE"],
                    "OPTIONS": {"options": os.environ.get("SESSION", "")},
                }
            }
        """)
    )
    (tmp_path / "shop" / "models.py").write_text(
        "from django.db import models\n\n\nclass Product(models.Model):\n"
        "    name = models.TextField()\n"
    )
    (tmp_path / "shop" / "tests.py").write_text(
        dedent("""
            from django.test import TestCase
            from shop.models import Product

            class Shop(TestCase):
                def test_one(self):
                    Product.objects.create(name="a")
                    self.assertEqual(Product.objects.count(), 1)

                def test_two(self):
                    self.assertEqual(Product.objects.count(), 0)
        """)
    )
    env = {"PGHOST": "x", "PGPORT": "1", "PGUSER": "x", "PGDATABASE": "x"}
    run(*MANAGE, "makemigrations", "shop", cwd=tmp_path, **env)
    return tmp_path


MANAGE = (sys.executable, "-W", "ignore", "-m", "django")


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "settings")
    monkeypatch.setenv("PYTHONPATH", ".")


def test_django_migrates_a_template(
    django: Path, daemon: type[Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a command, which also gets libpq's variables, and through the URL."""
    monkeypatch.chdir(django)
    served = daemon("--template", f"app=cmd:{' '.join(MANAGE)} migrate")
    assert "shop_product" in tables(served.uri.replace("/test", "/app"))
    env = {"PGHOST": "127.0.0.1", "PGPORT": str(served.port), "PGUSER": "postgres"}
    run(*MANAGE, "migrate", cwd=django, PGDATABASE="live~template", **env)
    assert "shop_product" in tables(served.uri.replace("/test", "/live"))


@pytest.mark.parametrize(
    ("arguments", "session"),
    [(["--single"], ""), (["--isolation", "cluster"], "-c pgtemp.session=django")],
    ids=["single", "session"],
)
def test_djangos_own_test_runner(
    django: Path, daemon: type[Daemon], arguments: list[str], session: str
) -> None:
    """Each run of it creates and drops its own database."""
    served = daemon(*arguments)
    env = {"PGHOST": "127.0.0.1", "PGPORT": str(served.port), "PGUSER": "me", "SESSION": session}
    for _ in range(2):
        output = run(*MANAGE, "test", cwd=django, PGDATABASE="test", **env)
        assert "Ran 2 tests" in output and "OK" in output


def test_knex(daemon: type[Daemon], tmp_path: Path) -> None:
    """Migrations by a tool that is not written in Python, through the URL."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    (tmp_path / "package.json").write_text('{"private": true, "dependencies": {}}')
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "knex@3", "pg@8"]
    run(*install, cwd=tmp_path)
    (tmp_path / "knexfile.js").write_text(
        "module.exports = { client: 'pg', connection: process.env.DATABASE_URL };\n"
    )
    (tmp_path / "migrations").mkdir()
    for number in (1, 2):
        (tmp_path / "migrations" / f"{number}.js").write_text(
            f"exports.up = (knex) => knex.schema.createTable('t{number}', (t) => t.increments());\n"
            f"exports.down = (knex) => knex.schema.dropTable('t{number}');\n"
        )
    served = daemon()
    url = served.uri.replace("/test", "/app~template")
    run("npx", "knex", "migrate:latest", cwd=tmp_path, DATABASE_URL=url)
    assert tables(served.uri.replace("/test", "/app")) == (
        "knex_migrations knex_migrations_lock t1 t2"
    )
