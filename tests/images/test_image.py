"""Images: built once, checked for damage, shared by processes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pgtemp import ClusterError, OptionError, PgTempDB
from pgtemp.host import identity
from pgtemp.host.tree import Tree
from pgtemp.images import cache, publish
from pgtemp.images.image import Image
from pgtemp.programs.installation import Installation
from support import children, eventually


def use_empty_cache(tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an empty cache for this test, in a directory."""
    monkeypatch.setenv("PGTEMP_CACHE_DIR", str(tmp / "cache"))


def build(programs: Installation, **arguments: str) -> Image:
    return cache.Cached(programs, arguments, identity.choose(None)).resolve()


def test_the_second_start_does_not_run_initdb(
    open_dir: Path, monkeypatch: pytest.MonkeyPatch, programs: Installation
) -> None:
    """A server starts from the image even if initdb cannot run."""
    use_empty_cache(open_dir, monkeypatch)
    with PgTempDB(bin_dir=programs.bin_dir):
        pass
    (built,) = (open_dir / "cache" / "images").glob("*/manifest.json")
    script = (
        "from pgtemp import PgTempDB\n"
        "from pgtemp.images import initdb\n"
        "def fail(*a): raise AssertionError('initdb was run')\n"
        "initdb._initdb = fail\n"
        f"with PgTempDB(bin_dir={str(programs.bin_dir)!r}) as db: db.connect().close()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert [built] == list((open_dir / "cache" / "images").glob("*/manifest.json"))


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        ("truncate", "base/5/1259"),
        pytest.param("empty", "base/5/1249", marks=pytest.mark.slow),
        pytest.param("delete", "pg_xact/0000", marks=pytest.mark.slow),
        pytest.param("grow", "base/1/1259", marks=pytest.mark.slow),
        ("delete", "global/1260"),
        ("zero", "global/pg_control"),
    ],
)
def test_a_damaged_image_is_rebuilt_once_with_a_warning(
    open_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    programs: Installation,
    caplog: pytest.LogCaptureFixture,
    damage: str,
    part: str,
) -> None:
    """The copy detects a missing, shortened or extended file, or another control file."""
    use_empty_cache(open_dir, monkeypatch)
    built = build(programs)
    file = built.path / "data" / part
    if damage == "delete":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "zero":
        file.write_bytes(bytes(8192))
    else:
        os.truncate(file, file.stat().st_size + (8192 if damage == "grow" else -8192))
    with (
        caplog.at_level(logging.WARNING, "pgtemp"),
        PgTempDB(bin_dir=programs.bin_dir) as db,
        db.connect() as connection,
    ):
        assert connection.execute("SELECT count(*) > 0 FROM pg_class").fetchone() == (True,)
    assert caplog.text.count("will be rebuilt") == 1


@pytest.mark.slow
def test_processes_that_build_at_once_create_one_image(
    open_dir: Path, programs: Installation
) -> None:
    """16 processes start on an empty cache, and the builder is killed: the others use one image."""
    script = (
        "import sys\nfrom pgtemp import PgTempDB\nprint('go', flush=True)\n"
        f"with PgTempDB(bin_dir={str(programs.bin_dir)!r}) as db: db.connect().close()\n"
    )
    env = {**os.environ, "PGTEMP_CACHE_DIR": str(open_dir / "cache")}
    builders = [
        subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE)
        for _ in range(16)
    ]
    images = open_dir / "cache" / "images"
    at_work: list[subprocess.Popen[bytes]] = []

    def found() -> bool:
        at_work[:] = (one for one in builders if "initdb" in children(one.pid).values())
        return bool(at_work)

    assert eventually(found, 60)
    at_work[0].kill()
    for builder in builders:
        builder.communicate(timeout=120)
    assert sorted(builder.returncode for builder in builders) == [-9] + [0] * 15
    assert len(list(images.glob("*/manifest.json"))) == 1
    assert not list(images.glob("*.building"))


def test_a_failed_build_leaves_nothing(
    open_dir: Path, monkeypatch: pytest.MonkeyPatch, programs: Installation
) -> None:
    use_empty_cache(open_dir, monkeypatch)
    with pytest.raises(ClusterError, match="initdb") as caught:
        PgTempDB(bin_dir=programs.bin_dir, initdb_args={"locale": "xx_XX"}).start()
    assert "xx_XX" in str(caught.value)
    assert [
        path for path in (open_dir / "cache" / "images").iterdir() if path.suffix != ".lock"
    ] == []


@pytest.mark.parametrize("name", ["pgdata", "auth-host", "pwfile", "-x y", "U", "auth-l", "usern"])
def test_initdb_arguments_that_pgtemp_sets_are_refused(name: str, programs: Installation) -> None:
    with pytest.raises(OptionError, match="initdb_args"):
        build(programs, **{name: "x"})


@pytest.mark.slow
def test_images_unused_for_a_month_are_pruned(
    open_dir: Path, monkeypatch: pytest.MonkeyPatch, programs: Installation
) -> None:
    """Building a new image removes the old ones; one in use stays."""
    use_empty_cache(open_dir, monkeypatch)
    old, used = (
        build(programs),
        build(programs, locale="C"),
    )
    past = time.time() - (cache.UNUSED_DAYS + 1) * 86400
    os.utime(old.path, (past, past))
    build(programs, locale="POSIX")
    assert not old.path.exists()
    assert used.path.exists()


def test_files_that_a_tenant_adds_to_global(open_dir: Path) -> None:
    """The search for the password reads only small relation files, and at most 200."""
    verifier = b"SCRAM-SHA-256$4096:" + b"A" * 24 + b"$" + b"B" * 44 + b":" + b"C" * 44
    directory = open_dir / "global"
    directory.mkdir()
    (directory / "1260").write_bytes(b"x" * 100 + verifier)
    for name, size in (("1259", 1 << 20), ("9999", 15 << 20), ("1260_fsm", 0), ("0x", 0)):
        (directory / name).write_bytes(verifier)
        os.truncate(directory / name, max(size, len(verifier)))
    for number in range(2000, 2500):
        (directory / f"{number}").write_bytes(verifier if number > 2250 else b"")
    with Tree.open(open_dir) as data:
        assert publish._find_verifier(data) == ("global/1260", 100)
