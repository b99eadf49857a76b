"""Django's test databases: migrated once, then cloned, with its own runner and with pytest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pgtemp.django
from pgtemp import OptionError
from support import eventually, homes

SHOP = Path(__file__).parents[1] / "examples" / "django_shop"
MIGRATES = "Creating test database"


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A copy of the example, whose template has not been built yet."""
    copy = tmp_path / "shop"
    shutil.copytree(SHOP, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def manage(shop: Path, *arguments: str, fails: bool = False) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], cwd=shop, capture_output=True, text=True, check=False,
        timeout=120, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.slow
def test_migrations_run_once(shop: Path) -> None:
    """They run again when a migration or a model changes; nothing is left."""
    before = homes()
    output = manage(shop, "manage.py", "test")
    assert "Ran 3 tests" in output
    assert MIGRATES in output
    output = manage(shop, "manage.py", "test")
    assert "Ran 3 tests" in output
    assert MIGRATES not in output
    models = shop / "shop" / "models.py"
    models.write_text(models.read_text() + "\n# changed\n")
    assert MIGRATES in manage(shop, "manage.py", "test")
    assert eventually(lambda: homes() <= before)


@pytest.mark.slow
def test_in_parallel(shop: Path) -> None:
    """Django's own processes get clones of the clone."""
    tests = (shop / "shop" / "tests.py").read_text()
    (shop / "shop" / "test_more.py").write_text(tests)
    (shop / "shop" / "tests.py").rename(shop / "shop" / "test_some.py")
    output = manage(shop, "manage.py", "test", "--parallel", "2")
    assert "Ran 6 tests" in output
    assert output.count("Cloning test database") == 2


@pytest.mark.slow
def test_with_pytest(shop: Path) -> None:
    plugins = ["-p", "pytest_django.plugin", "-p", "xdist", "-p", "no:cacheprovider"]
    for more in ([], ["-n", "2"]):
        assert "3 passed" in manage(shop, "-m", "pytest", "-q", *plugins, *more)


def test_a_failing_migration(shop: Path) -> None:
    """The error is Django's own, and the next run tries again."""
    migration = shop / "shop" / "migrations" / "0002_wrong.py"
    migration.write_text(
        "from django.db import migrations\n"
        "class Migration(migrations.Migration):\n"
        "    dependencies = [('shop', '0001_initial')]\n"
        "    operations = [migrations.RunSQL('CREATE TABEL x ()')]\n"
    )
    assert 'syntax error at or near "TABEL"' in manage(shop, "manage.py", "test", fails=True)
    migration.unlink()
    assert "Ran 3 tests" in manage(shop, "manage.py", "test")


def test_two_runs_and_a_mirror(shop: Path) -> None:
    """Two runs in one process, with a mirror; afterwards the settings are as before."""
    (shop / "run.py").write_text(
        "import os, django\n"
        "os.environ['DJANGO_SETTINGS_MODULE'] = 'settings'\n"
        "from django.conf import settings\n"
        "settings.DATABASES['mirror'] = {\n"
        "    **settings.DATABASES['default'], 'TEST': {\n"
        "        **settings.DATABASES['default']['TEST'], 'MIRROR': 'default'}}\n"
        "django.setup()\n"
        "from django.db import connections\n"
        "from django.test.utils import setup_databases, teardown_databases\n"
        "for _ in range(2):\n"
        "    made = setup_databases(verbosity=1, interactive=False)\n"
        "    for name in ('default', 'mirror'):\n"
        "        with connections[name].cursor() as cursor:\n"
        "            cursor.execute('SELECT count(*) FROM shop_order')\n"
        "            print(name, cursor.fetchone())\n"
        "    teardown_databases(made, verbosity=0)\n"
        "    print(connections['default'].settings_dict['HOST'])\n"
    )
    output = manage(shop, "run.py")
    assert output.count(MIGRATES) == 1
    assert output.count("default (0,)") == output.count("mirror (0,)") == 2
    assert output.count("db.example.org") == 2


def test_settings() -> None:
    """Other engines are unchanged; without a PostgreSQL engine, there is an error."""
    given = {
        "default": {"ENGINE": "django.db.backends.postgresql", "TEST": {"MIGRATE": False}},
        "maps": {"ENGINE": "django.contrib.gis.db.backends.postgis"},
        "old": {"ENGINE": "django.db.backends.sqlite3"},
    }
    made = pgtemp.django.databases(given, watch=["x"], version="16")
    assert [one["ENGINE"] for one in made.values()] == [
        "pgtemp.django.postgresql",
        "pgtemp.django.postgis",
        "django.db.backends.sqlite3",
    ]
    assert made["default"]["TEST"]["MIGRATE"] is False
    assert made["default"]["TEST"][pgtemp.django.OPTIONS]["options"] == {"version": "16"}
    with pytest.raises(OptionError, match="none of the DATABASES"):
        pgtemp.django.databases({"default": {"ENGINE": "django.db.backends.sqlite3"}})
