"""Directories of migration tools are refused as plain SQL, with the command to use instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgtemp import Cluster, OptionError
from pgtemp.templates import migrations
from support import run_pgtemp

ITEM = "CREATE TABLE item (id int);\n"
TOOLS = {
    "goose": {"00001_item.sql": f"-- +goose Up\n{ITEM}-- +goose Down\nDROP TABLE item;\n"},
    "goose, indented": {"1_item.sql": f"\n\n --  +goose  NO TRANSACTION\n--+goose Up\n{ITEM}"},
    "dbmate": {"20240101_item.sql": f"-- migrate:up\n{ITEM}\n-- migrate:down\nDROP TABLE item;\n"},
    "golang-migrate": {"0001_item.up.sql": ITEM, "0001_item.down.sql": "DROP TABLE item;\n"},
    "golang-migrate, up only": {"1_item.up.sql": ITEM},
    "sqlx": {"20240101000000_item.up.sql": ITEM, "20240101000000_item.down.sql": "DROP TABLE item"},
    "sqlx in a Rust project": {"../Cargo.toml": "[package]\n", "0001_item.sql": ITEM},
    "Flyway": {"V1__item.sql": ITEM, "V10__drop.sql": "SELECT 1;", "R__views.sql": "SELECT 1;"},
    "Flyway, dotted": {"V2024.01.01__item.sql": ITEM},
    "Flyway, undo": {"B3__item.sql": ITEM, "U4__item.sql": ITEM},
    "Liquibase": {"changelog.sql": f"--liquibase formatted sql\n--changeset me:1\n{ITEM}"},
    "Liquibase XML": {"changelog.xml": "<databaseChangeLog/>", "a.sql": ITEM},
    "Liquibase YAML": {"changelog.yaml": "databaseChangeLog:\n", "a.sql": ITEM},
    "Prisma": {"20240101_item/migration.sql": ITEM, "migration_lock.toml": ""},
    "Diesel": {"2024-01-01-000000_item/up.sql": ITEM, "2024-01-01-000000_item/down.sql": ""},
    "Drizzle": {"0000_item.sql": ITEM, "meta/_journal.json": "{}"},
    "Drizzle, several statements": {"0000_item.sql": f"{ITEM}--> statement-breakpoint\n{ITEM}"},
    "node-pg-migrate": {"1_item.sql": f"-- Up Migration\n{ITEM}-- Down Migration\n"},
    "Atlas": {"20240101_item.sql": ITEM, "atlas.sum": "h1:x"},
    "Rails": {"20240101_item.rb": "class Item < ActiveRecord::Migration[7.1]\nend\n"},
    "Alembic": {"env.py": "", "versions/1_item.py": ""},
    "Alembic versions": {"1_item.py": "revision = '1'\ndown_revision = None\n"},
    "Django": {"0001_initial.py": "class Migration(migrations.Migration):\n    pass\n"},
}  # fmt: skip


def written(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


@pytest.mark.parametrize("name", TOOLS)
def test_migrations_of_a_tool_are_refused(tmp_path: Path, name: str) -> None:
    """The error has the tool's name, its command, and the files to watch."""
    directory = written(tmp_path / "project" / "migrations", TOOLS[name])
    tool = name.partition(",")[0].partition(" ")[0]
    with Cluster() as cluster, pytest.raises(OptionError) as caught:
        cluster.template("app", build=directory)
    message = str(caught.value)
    assert f"migrations of {tool}" in message
    assert "'cmd:" in message and f"watch '{directory}/**'" in message


def test_a_single_file_of_a_tool_is_refused(tmp_path: Path) -> None:
    """Otherwise its statements that undo the migration would be executed too."""
    path = written(tmp_path, TOOLS["goose"]) / "00001_item.sql"
    with Cluster() as cluster, pytest.raises(OptionError, match="migrations of goose"):
        cluster.template("app", build=path)


def test_the_command_line_refuses_them(tmp_path: Path) -> None:
    directory = written(tmp_path, TOOLS["goose"])
    done = run_pgtemp("--template", f"app={directory}", "postgresql://localhost:29391/app")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "migrations of goose" in done.stderr and "goose -dir" in done.stderr


PLAIN = {
    "numbers": ["1.sql", "2.sql", "10.sql"],
    "numbers in names": ["step2-b.sql", "step9.sql", "step10.sql", "step10a.sql"],
    "leading zeros": ["001_a.sql", "002_b.sql", "010_c.sql"],
    "letters": ["a.sql", "b.sql", "b1.sql"],
    "several numbers": ["1.2.sql", "1.10.sql", "2.1.sql"],
}


@pytest.mark.parametrize("names", PLAIN.values(), ids=PLAIN)
def test_plain_files_are_applied_in_natural_order(tmp_path: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        create = "CREATE TABLE applied (n int);" if number == 0 else ""
        (tmp_path / name).write_text(f"{create} INSERT INTO applied VALUES ({number});")
    with (
        Cluster() as cluster,
        cluster.template("app", build=tmp_path).database() as db,
        db.connect() as connection,
    ):
        rows = connection.execute("SELECT n FROM applied ORDER BY ctid").fetchall()
    assert [n for (n,) in rows] == list(range(len(names)))


def test_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    names = ["10.sql", "2.sql", "02.sql", "a.sql", "1.sql"]
    ordered = [path.name for path in migrations.in_order(tmp_path / name for name in names)]
    assert ordered == ["1.sql", "02.sql", "2.sql", "10.sql", "a.sql"]
    assert ordered == [p.name for p in migrations.in_order(tmp_path / n for n in reversed(names))]


def test_words_of_a_tool_in_comments_do_not_make_a_migration(tmp_path: Path) -> None:
    """A marker is a line of its own form."""
    (tmp_path / "a.sql").write_text("-- moves up and down; see goose\n" + ITEM)
    with (
        Cluster() as cluster,
        cluster.template("app", build=tmp_path).database() as db,
        db.connect() as connection,
    ):
        assert connection.execute("SELECT count(*) FROM item").fetchone() == (0,)
