"""What a template is made from, and the hash of what decides how it comes out."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from pgtemp import OptionError
from pgtemp.templates.recipe import Recipe


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_tell_by_their_bytes(place: Path) -> None:
    """A change of a byte is another template; the name and the time of a file are not."""
    path = place / "a.sql"
    path.write_text("CREATE TABLE t (n int)")
    before = Recipe(path).fingerprint()
    assert before == Recipe(path.rename(place / "b.sql")).fingerprint()
    (place / "b.sql").write_text("CREATE TABLE t (m int)")
    assert before != Recipe(place / "b.sql").fingerprint()


def test_a_directory_tells_by_its_files_in_order(place: Path) -> None:
    for name in ("1.sql", "2.sql"):
        (place / name).write_text(f"-- {name}")
    before = Recipe(place).fingerprint()
    (place / "1.sql").rename(place / "3.sql")
    assert before != Recipe(place).fingerprint()


@pytest.mark.parametrize(
    "text",
    [
        "\\i other.sql",
        "  \\ir other.sql",
        "\\copy t FROM 'data.csv'",
        "COPY t (a, b)\n FROM '/srv/data.csv'",
        "copy t from program 'date'",
        "\\set now `date`",
        "SELECT 1; \\i other.sql",
        "BEGIN; COPY t FROM '/srv/data.csv'",
        "SELECT pg_read_file('/etc/hostname')",
        "\\echo `cat x`",
    ],
)
def test_sql_that_reads_other_files_is_not_kept(place: Path, text: str) -> None:
    """Unless it is told what to watch."""
    path = place / "a.sql"
    path.write_text(f"CREATE TABLE t (a text, b text);\n{text}\n")
    (place / "other.sql").write_text("")
    assert Recipe(path).fingerprint() is None
    assert Recipe(path, watch=("*.sql",)).fingerprint() is not None


def test_what_pg_dump_writes_is_kept(place: Path) -> None:
    path = place / "dump.sql"
    said = "SELECT '\\d+', E'\\n';\nCOPY public.t (a) FROM stdin;\nfrom 'a'\n\\.\n"
    path.write_text(f"\\restrict x\n{said}\\unrestrict x\n")
    assert Recipe(path).fingerprint() is not None


def migrate(uri: str) -> None:
    """A callable."""


def test_callables_and_commands_need_a_key_or_files(place: Path) -> None:
    (place / "migrations").mkdir()
    (place / "migrations" / "1.py").write_text("1")
    for build in (migrate, "cmd:make migrate"):
        assert Recipe(build).fingerprint() is None
        assert Recipe(build, key="1").fingerprint() != Recipe(build, key="2").fingerprint()
        watching = Recipe(build, watch=("migrations",))
        before = watching.fingerprint()
        assert before is not None
        (place / "migrations" / "2.py").write_text("2")
        assert before != watching.fingerprint()
        (place / "migrations" / "2.py").unlink()
        assert before == watching.fingerprint()


def test_two_callables_may_have_the_same_key() -> None:
    builds = [migrate, print, partial(migrate, "a"), partial(migrate, "b")]
    assert len({Recipe(build, key="1").fingerprint() for build in builds}) == 4


def test_a_pattern_that_fits_nothing_is_an_error(place: Path) -> None:
    with pytest.raises(OptionError, match=r"no file to watch matches 'migratoins/\*'"):
        Recipe(migrate, watch=("migratoins/*",)).fingerprint()
