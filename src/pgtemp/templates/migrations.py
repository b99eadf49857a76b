"""Recognise the directories of migration tools, whose files are not to be applied as plain SQL.

Such a file may contain the statements that undo a migration, and only the tool itself writes the
table of the migrations that were applied. Without that table, the program under test would apply
them again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pgtemp.errors import OptionError
from pgtemp.sql.dump_restore import head

_HEAD_BYTES = 4096  # of a file; markers are in its first lines


@dataclass(frozen=True, slots=True)
class _Tool:
    """A migration tool.

    Attributes:
        command: the shell command that applies the migrations in the directory {dir}.
        marker: a regular expression for a line that only SQL files of the tool contain.
        recognise: whether a directory without such a line contains migrations of the tool.
    """

    name: str
    command: str
    marker: str = ""
    recognise: Callable[[Path], bool] = lambda directory: False


def check_plain(path: Path) -> None:
    """Raise OptionError, with the command to use instead, for migrations of a known tool.

    Args:
        path: a directory, or a file of SQL.
    """
    directory = path if path.is_dir() else path.parent
    for tool in _TOOLS:
        marked = bool(tool.marker) and any(_contains(tool.marker, file) for file in _sql_in(path))
        if marked or (path.is_dir() and tool.recognise(path)):
            command = tool.command.format(dir=directory)
            raise OptionError(
                f"{path} contains migrations of {tool.name}, which are not plain SQL",
                remedy=f"build with 'cmd:{command}' and watch '{directory}/**'",
            )


def _sql_in(path: Path) -> Iterable[Path]:
    return path.glob("*.sql") if path.is_dir() else [path]


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Sort files by name; numbers in names are compared by value, so that 2 precedes 10."""

    def key(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", path.name.partition(".sql")[0])
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]

    return sorted(paths, key=lambda path: (key(path), path.name))


def _has(pattern: str, directory: Path) -> bool:
    return next(directory.glob(pattern), None) is not None


def _is_named(pattern: str, directory: Path) -> bool:
    return any(re.fullmatch(pattern, path.name) for path in directory.iterdir())


def _any_contains(pattern: str, files: str, directory: Path) -> bool:
    return any(_contains(pattern, path) for path in directory.glob(files) if path.is_file())


def _contains(pattern: str, path: Path) -> bool:
    return re.search(pattern.encode(), head(path, _HEAD_BYTES), re.M | re.I) is not None


def _is_of_sqlx(directory: Path) -> bool:
    project = (directory.parent / "Cargo.toml").is_file()
    reversible = _is_named(r"\d{14}_.*\.up\.sql", directory)
    return reversible or (project and _is_named(r"\d+_.*\.sql", directory))


def _is_of_alembic(directory: Path) -> bool:
    versions = _any_contains(r"^down_revision\b", "*.py", directory)
    return versions or ((directory / "env.py").is_file() and (directory / "versions").is_dir())


# A tool that is recognised by a marker precedes those that are recognised by names of files.
_TOOLS = (
    _Tool(
        "goose",
        'goose -dir {dir} postgres "$DATABASE_URL" up',
        marker=r"^\s*--\s*\+goose\b",
    ),
    _Tool(
        "dbmate",
        'dbmate --migrations-dir {dir} --no-dump-schema --url "$DATABASE_URL?sslmode=disable" up',
        marker=r"^\s*--\s*migrate:(up|down)\b",
    ),
    _Tool(
        "node-pg-migrate",
        "npx node-pg-migrate up --migrations-dir {dir}",
        marker=r"^\s*--\s*(up|down) migration\b",
    ),
    _Tool(
        "Liquibase",
        "liquibase update --changelog-file=CHANGELOG",
        marker=r"^\s*--\s*liquibase formatted sql",
        recognise=partial(_any_contains, "databaseChangeLog", "*.[xyj]*"),
    ),
    _Tool(
        "Drizzle",
        "npx drizzle-kit migrate",
        marker=r"^--> statement-breakpoint",
        recognise=partial(_has, "meta/_journal.json"),
    ),
    _Tool("Prisma", "npx prisma migrate deploy", recognise=partial(_has, "*/migration.sql")),
    _Tool(
        "Diesel",
        "diesel migration run --migration-dir {dir}",
        recognise=partial(_has, "*/up.sql"),
    ),
    _Tool("sqlx", "sqlx migrate run --source {dir}", recognise=_is_of_sqlx),
    _Tool(
        "golang-migrate",
        'migrate -path {dir} -database "$DATABASE_URL?sslmode=disable" up',
        recognise=partial(_is_named, r".*\.(up|down)\.sql"),
    ),
    _Tool(
        "Flyway",
        "flyway migrate -locations=filesystem:{dir}",
        recognise=partial(_is_named, r"([VUB]\d[\d._]*|R)__.+\.sql"),
    ),
    _Tool(
        "Atlas",
        'atlas migrate apply --dir "file://{dir}" --url "$DATABASE_URL"',
        recognise=partial(_has, "atlas.sum"),
    ),
    _Tool(
        "Rails",
        "bin/rails db:migrate",
        recognise=partial(_any_contains, "ActiveRecord::Migration", "*.rb"),
    ),
    _Tool("Alembic", "alembic upgrade head", recognise=_is_of_alembic),
    _Tool(
        "Django",
        "python manage.py migrate",
        recognise=partial(_any_contains, r"migrations\.Migration\b", "*.py"),
    ),
)
