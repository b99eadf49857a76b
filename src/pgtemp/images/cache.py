"""The cache of images: each is built once on this machine, by one process, under a lock.

An image is built (initdb.py) in a sibling directory and published by a rename. Checking for a
particular file would not be enough, because an initdb that was killed can leave a directory in
which a server can start. The image's name is the hash of everything that determines its bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from pgtemp.errors import ClusterError
from pgtemp.host import disk_space, locks, paths, trusted
from pgtemp.host.file_copy import ChangedError
from pgtemp.host.identity import Identity
from pgtemp.host.progress import step
from pgtemp.host.removal import remove
from pgtemp.images import initdb
from pgtemp.images.image import Image
from pgtemp.images.publish import MANIFEST
from pgtemp.programs.installation import Installation

_log = logging.getLogger("pgtemp")
SCHEMA = 5  # the version of the image's layout and of the steps that build its data directory
UNUSED_DAYS = 30
MAX_BYTES = 4 << 30
RUN_SECONDS = 86400  # per-run images older than this were left behind by a killed run
_OF_A_RUN = "-template-run-"
_HAS_GLIBC = "CS_GNU_LIBC_VERSION" in os.confstr_names


class Ensured(ABC):
    """An image that is built when it is first needed, and rebuilt if it is damaged."""

    @abstractmethod
    def resolve(self) -> Image:
        """Return the image; build it if it does not exist."""

    def repair(self, damage: ChangedError) -> None:
        _log.warning("the image is damaged and will be rebuilt: %s", damage)
        self.resolve().discard()


@dataclass(frozen=True, slots=True)
class Cached(Ensured):
    """The image that initdb creates, for an installation and arguments."""

    installation: Installation
    initdb_args: Mapping[str, str]
    owner: Identity

    @property
    def identity(self) -> str:
        return self.resolve().path.name

    def resolve(self) -> Image:
        """Return the image; build it with initdb if it does not exist.

        Raises OptionError if initdb does not accept an argument or pgtemp itself sets it, and
        ClusterError if initdb failed; the details are its output.
        """
        programs = self.installation
        arguments = initdb.arguments(programs, self.initdb_args)
        libc = os.confstr("CS_GNU_LIBC_VERSION") if _HAS_GLIBC else ""
        key = key_of(programs.identity, libc or "", *arguments, *self.owner.made_as)
        return ensure(
            f"{programs.major}-{key}",
            f"running initdb of PostgreSQL {programs.version} (once per machine)",
            lambda path, lock: initdb.build(programs, arguments, path, self.owner, lock),
        )


_loaded: dict[tuple[Path, int], Image] = {}


def key_of(*parts: str) -> str:
    """The name of an image: a hash of everything that determines its bytes."""
    return hashlib.sha256("\0".join([str(SCHEMA), *parts]).encode()).hexdigest()[:24]


def name_of(major: int, identity: str, run: str | None) -> str:
    """The name of a template's image.

    Args:
        run: the name of the only run that may use it; None caches it permanently.
    """
    kind = f"{_OF_A_RUN}{run}-" if run is not None else "-template-"
    return f"{major}{kind}{identity}"


def forget(run: str) -> None:
    """Remove the images that were cached for one run only, at the end of that run."""
    for lock in (_trusted_cache() / "images").glob(f"*{_OF_A_RUN}{run}-*.lock"):
        _remove(lock.with_suffix(""))


def ensure(name: str, what: str, build: Callable[[Path, int], None]) -> Image:
    """Return the image of that name; if it is not in the cache, exactly one process builds it.

    Raises PgTempError if the build failed.

    Args:
        name: from `key_of`.
        what: the description of the build, for progress messages.
        build: builds the image at a path; it also gets the descriptor of the lock, which must be
            held while a program of the build runs.
    """
    path = paths.cache_dir() / "images" / name
    if (image := _load(path)) is not None:
        return image
    with ExitStack() as held:
        with disk_space.writing(path.parent, disk_space.CACHE_REMEDY):
            paths.make_dirs(path.parent)
            lock = held.enter_context(locks.locked(path.with_suffix(".lock")))
        if (image := _load(path)) is None:  # no other process built it in the meantime
            with step(what):
                build(path, lock)
            image = _load(path)
    if image is None:
        raise ClusterError(f"the image {path} cannot be read although it was just built")
    _prune(path.parent)
    return image


def _load(path: Path) -> Image | None:
    """Return the image at a path; read it from disk again if another process has rebuilt it."""
    try:
        written = (path / MANIFEST).stat().st_mtime_ns
        if (path, written) not in _loaded:
            manifest = json.loads((path / MANIFEST).read_bytes())
            _loaded[path, written] = Image(
                path,
                tuple(manifest["dirs"]),
                tuple((name, size) for name, size in manifest["files"]),
                manifest["control"],
                password=manifest["password"] and (*manifest["password"],),
                lock=path.with_suffix(".lock"),
            )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _loaded[path, written]


def _prune(images: Path) -> None:
    """Remove images not used for a month, and the least recently used beyond the size limit."""
    oldest, total = time.time() - UNUSED_DAYS * 86400, 0
    found = sorted(_sizes(images), reverse=True)
    for rank, (when, size, path) in enumerate(found):
        total += size
        stale = when < oldest or (_OF_A_RUN in path.name and when < time.time() - RUN_SECONDS)
        if stale or (total > MAX_BYTES and rank > 0):
            with suppress(OSError):  # the lock file cannot be created
                _remove(path)


def _remove(path: Path) -> None:
    lock = path.with_suffix(".lock")
    with locks.locked(lock):
        remove(path)
        if _OF_A_RUN in path.name:  # no process will request it again
            lock.unlink(missing_ok=True)


def sweep() -> list[Path]:
    """Remove directories that killed builds left in the cache; return their paths."""
    left = []
    for building in _trusted_cache().glob("*/*.building*"):
        lock = building.with_name(building.name.partition(".building")[0] + ".lock")
        # Suppressed because the lock file may belong to another user.
        with suppress(OSError), locks.locked_at_once(lock) as free:
            if free:
                remove(building)
                left.append(building)
    return left


def _trusted_cache() -> Path:
    """The cache directory; if other users can change it, a path that contains nothing."""
    path = paths.usual_cache_dir()
    return path if trusted.find_flaw(path, sticky=False) is None else Path(os.devnull)


def _sizes(images: Path) -> Iterator[tuple[float, int, Path]]:
    """For each image: when it was last used, its size in bytes, and its path."""
    for manifest in images.glob(f"*/{MANIFEST}"):
        if manifest.parent.suffix:  # an image that is being built
            continue
        try:
            size = sum(size for _, size in json.loads(manifest.read_bytes())["files"])
            yield manifest.parent.stat().st_mtime, size, manifest.parent
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another process has just removed it
