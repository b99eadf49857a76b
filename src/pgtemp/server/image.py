"""Images: cached data directories that clusters are born from by copying.

    images/<key>/manifest.json   what there is, with sizes, and the control file's hash
    images/<key>/data/           a data directory, shut down cleanly
    images/<key>/warm/           relation cache files, put in place once the server runs

They are built by imagebuild.py and found again by imagecache.py.

A copy is made in four parts, because a postmaster does not read the databases while it starts
from a clean shutdown: `begin` is what it needs to start; `first`, copied while it starts, the
database `postgres`; `rest` the templates, copied while the first connection is already at work;
`warm` the files that spare that connection building its relation cache (start-up deletes them, so
they come after it). Together that takes half of the time to the first row away.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pgtemp.errors import ClusterError
from pgtemp.host import copying, locks
from pgtemp.host.copying import ChangedError, Listing
from pgtemp.host.identity import Identity
from pgtemp.server import imagebuild
from pgtemp.server.imagebuild import CONTROL, DATA, NEVER_COPIED, RELCACHE, WARM
from pgtemp.server.installation import Installation

VERIFIER_LENGTH = 133
POSTGRES_OID = 5  # of the database postgres, the same in all clusters since PostgreSQL 15


class Source(Protocol):
    """What a cluster's data directory is copied from."""

    @property
    def identity(self) -> str:
        """What tells it from all others; the same for the same bytes."""

    def resolve(self) -> Copyable:
        """What to copy, the same from beginning to end; made where there is none.

        Raises:
            PgTempError: it cannot be made.
        """

    def repair(self, damage: ChangedError) -> None:
        """Make what is damaged anew, or raise ClusterError."""


class Copyable(Protocol):
    """The parts of a data directory, each copied at its time."""

    @property
    def extent(self) -> tuple[int, int]:
        """How many bytes there are, in how many files."""

    def begin(self, target: Path, owner: Identity) -> None: ...
    def first(self, target: Path, owner: Identity) -> None: ...
    def rest(self, target: Path, owner: Identity) -> None: ...
    def warm(self, target: Path, owner: Identity) -> None: ...
    def set_password(self, target: Path, verifier: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Directory:
    """A data directory that a user prepared: copied whole, never touched."""

    path: Path

    @property
    def identity(self) -> str:
        return f"{self.path} {imagebuild.control_hash(self.path)}"

    @property
    def extent(self) -> tuple[int, int]:
        listing = copying.list_tree(self.path, NEVER_COPIED)
        return listing.size, len(listing.files)

    def resolve(self) -> Copyable:
        return self

    def begin(self, target: Path, owner: Identity) -> None:
        listing = copying.list_tree(self.path, NEVER_COPIED)
        copying.make_dirs(target, listing.dirs, owner)
        copying.copy_files(self.path, target, listing.files, owner)

    def first(self, target: Path, owner: Identity) -> None:
        """Nothing is left: where the shutdown was unclean, start-up reads the databases."""

    def rest(self, target: Path, owner: Identity) -> None:
        """Nothing is left."""

    def warm(self, target: Path, owner: Identity) -> None:
        """Nothing is known about its relation cache."""

    def set_password(self, target: Path, verifier: str) -> bool:
        """Nothing is known about its users."""
        return False

    def repair(self, damage: ChangedError) -> None:
        raise ClusterError(
            f"{self.path} changed while it was copied: {damage}",
            remedy="end the server that runs on it first",
        )


@dataclass(frozen=True, slots=True)
class Image:
    """A cached data directory."""

    path: Path
    dirs: tuple[str, ...]
    early: tuple[tuple[str, int], ...]
    postgres: tuple[tuple[str, int], ...]
    templates: tuple[tuple[str, int], ...]
    control: str
    password: tuple[str, int] | None = None  # the file and the offset of the verifier
    lock: Path | None = None  # where other processes may build or remove it

    @property
    def identity(self) -> str:
        return self.control

    @property
    def extent(self) -> tuple[int, int]:
        files = (*self.early, *self.postgres, *self.templates)
        return sum(size for _, size in files), len(files)

    def resolve(self) -> Copyable:
        return self

    def begin(self, target: Path, owner: Identity) -> None:
        """Copy what a postmaster needs to start. Raises ChangedError where it is damaged."""
        with self._undamaged():
            os.utime(self.path)  # for pruning
            copying.make_dirs(target, self.dirs, owner)
            copying.copy_files(self.path / DATA, target, self.early, owner)

    def first(self, target: Path, owner: Identity) -> None:
        """Copy the database `postgres`. Raises ChangedError where the image is damaged."""
        with self._undamaged():
            copying.copy_files(self.path / DATA, target, self.postgres, owner)

    def rest(self, target: Path, owner: Identity) -> None:
        """Copy the templates. Raises ChangedError where the image is damaged."""
        with self._undamaged():
            # By one thread: the server and its first client need the other core.
            copying.copy_files(self.path / DATA, target, self.templates, owner, threads=1)

    def warm(self, target: Path, owner: Identity) -> None:
        """Put the relation cache files in place, unless the server has made its own already."""
        for name, size in self.relcache:
            try:
                copying.copy_files(self.path / WARM, target, [(name, size)], owner)
            except (FileExistsError, ChangedError):
                continue  # only a shortcut

    @property
    def relcache(self) -> tuple[tuple[str, int], ...]:
        """The relation cache files known so far, with their sizes."""
        if self.control not in _relcaches and (self.path / WARM).is_dir():
            _relcaches[self.control] = copying.list_tree(self.path / WARM).files
        return _relcaches.get(self.control, ())

    def learn(self, data: Path) -> None:
        """Keep the relation cache files of a cluster on this image that did nothing but connect.

        What is in them follows from the catalogs alone, so they fit every copy.
        """
        with self._locked():
            fresh = self.path / f"{WARM}.building"
            shutil.rmtree(fresh, ignore_errors=True)
            try:
                imagebuild.keep_relcache(data, fresh)
                if fresh.exists() and not (self.path / WARM).exists():
                    fresh.rename(self.path / WARM)
            except OSError:  # no room: only a shortcut
                shutil.rmtree(fresh, ignore_errors=True)

    @contextmanager
    def _undamaged(self) -> Iterator[None]:
        with self._locked(shared=True):
            if imagebuild.control_hash(self.path / DATA) != self.control:
                raise ChangedError(f"{self.path / DATA / CONTROL} is not what was published")
            yield

    def discard(self) -> None:
        """Remove a damaged image."""
        with self._locked():
            shutil.rmtree(self.path, ignore_errors=True)

    def set_password(self, target: Path, verifier: str) -> bool:
        """Put the superuser's verifier into a copy that no server has started on.

        initdb stored one of the same length, in a row that nothing points into and with page
        checksums off, so this is what ALTER ROLE would leave; it takes no connection, which is
        a seventh of the time to the first row. False where it has to be done by SQL.
        """
        if self.password is None or len(verifier) != VERIFIER_LENGTH:
            return False
        name, offset = self.password
        with open(target / name, "r+b") as file:
            file.seek(offset)
            file.write(verifier.encode("ascii"))
        return True

    def _locked(self, *, shared: bool = False) -> AbstractContextManager[object]:
        return nullcontext() if self.lock is None else locks.locked(self.lock, shared=shared)

    def repair(self, damage: ChangedError) -> None:
        raise ClusterError(f"{self.path} is damaged: {damage}", remedy="start again")


_relcaches: dict[str, tuple[tuple[str, int], ...]] = {}


def divided(
    path: Path,
    listing: Listing,
    control: str,
    password: tuple[str, int] | None,
    lock: Path | None,
) -> Image:
    """An image, its files divided into those that are copied at once and those that can wait."""
    first = f"base/{POSTGRES_OID}/"
    files = [one for one in listing.files if not one[0].endswith(RELCACHE)]
    early = tuple(one for one in files if not one[0].startswith("base/"))
    postgres = tuple(one for one in files if one[0].startswith(first))
    taken = {*early, *postgres}
    rest = tuple(one for one in files if one not in taken)
    return Image(path, listing.dirs, early, postgres, rest, control, password, lock)


def of_home(path: Path, installation: Installation) -> Image:
    """An image that is nobody else's: the home of a cluster that was shut down cleanly.

    It lasts as long as that home. What is in a tablespace is copied into it.
    """
    data = path / DATA
    imagebuild.drop_spare_wal(installation, data)
    return divided(
        path, copying.list_tree(data, NEVER_COPIED), imagebuild.control_hash(data), None, None
    )
