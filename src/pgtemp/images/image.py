"""Images: data directories in the cache, from which the data directories of servers are copied.

    images/<key>/manifest.json   the list of files, with sizes, and the control file's hash
    images/<key>/data/           a data directory, shut down cleanly
    images/<key>/warm/           relation cache files, added once the server runs

initdb.py builds them, and cache.py finds and removes them.

An image is copied in four parts, because a postmaster that starts after a clean shutdown does not
read the databases: `begin` copies the files that it needs to start; `first`, while it starts, the
database `postgres`; `rest` the templates, while the first connection is already in use; `warm` the
relation cache files, so that this connection need not build the cache (start-up deletes these
files, so they are added after it). In total, this halves the time to the first row.

When a directory of the copy is complete, the server user becomes its owner. The server may read it
before that, because start-up searches each database for files of a crashed server.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from pgtemp.errors import ClusterError
from pgtemp.host import file_copy, locks
from pgtemp.host.file_copy import ChangedError, Listing
from pgtemp.host.tree import Tree
from pgtemp.images.source import CONF, CONTROL, Copyable, control_hash
from pgtemp.supervisor.leftovers import DATA

WARM = "warm"
RELCACHE = "pg_internal.init"
_VERIFIER_LENGTH = 133
_RELCACHE_BYTES = 4 << 20  # the limit for one file; usually one has 200 KB
_READABLE = 0o755  # mode of an incomplete directory; other users cannot enter the data directory
_BASE, _GLOBAL = "base/", "global"
_POSTGRES = "base/5"  # of the database postgres, in all clusters since PostgreSQL 15


@dataclass(frozen=True, slots=True)
class Image(Copyable):
    """A data directory that was shut down cleanly, and is copied many times.

    Attributes:
        dirs, files: the directories and files to copy; the files with their sizes, sorted.
        control: the hash of the control file.
        conf: the text for postgresql.conf; None if the data directory contains the file.
        password: the file and the offset of the superuser's verifier.
        lock: the lock file, if other processes may build or remove the image.
    """

    path: Path
    dirs: tuple[str, ...]
    files: tuple[tuple[str, int], ...]
    control: str
    conf: str | None = None
    password: tuple[str, int] | None = None
    lock: Path | None = None

    @property
    def identity(self) -> str:
        return self.control

    @property
    def extent(self) -> tuple[int, int]:
        return sum(size for _, size in self.files), len(self.files)

    def resolve(self) -> Copyable:
        return self

    def begin(self, target: Tree) -> None:
        with self._undamaged() as data:
            os.utime(self.path)  # records the time of use, for pruning
            for name in self.dirs:
                late = _is_late(name) and target.gid is not None
                target.make_directory(name, _READABLE if late else 0o700)
            early = [file for file in self.files if not file[0].startswith(_BASE)]
            file_copy.copy_files(data, target, early)
        if self.conf is not None:
            target.write(CONF, self.conf.encode(errors="surrogateescape"))
        # After this the server user can rename directories, so these stay open.
        target.hold(_GLOBAL, *filter(_is_late, self.dirs))
        target.hand_over(*(name for name in self.dirs if not _is_late(name)))

    def first(self, target: Tree) -> None:
        with self._undamaged() as data:
            file_copy.copy_files(data, target, self._late_files(of_postgres=True))
        target.hand_over(_POSTGRES)

    def rest(self, target: Tree) -> None:
        with self._undamaged() as data:
            # In one thread, because the server and its first client need the other core.
            file_copy.copy_files(data, target, self._late_files(of_postgres=False), threads=1)
        target.hand_over(*(name for name in self.dirs if _is_late(name) and name != _POSTGRES))

    def _late_files(self, *, of_postgres: bool) -> list[tuple[str, int]]:
        late = [file for file in self.files if file[0].startswith(_BASE)]
        return [file for file in late if file[0].startswith(f"{_POSTGRES}/") is of_postgres]

    def warm(self, target: Tree) -> None:
        """Add the relation cache files, unless the server has already created them."""
        if not self.relcache:
            return
        with suppress(FileNotFoundError), Tree.open(self.path / WARM) as saved:
            for file in self.relcache:
                with suppress(FileExistsError, ChangedError):  # only an optimization
                    file_copy.copy_files(saved, target, [file])

    @property
    def relcache(self) -> tuple[tuple[str, int], ...]:
        """The relation cache files known so far, with their sizes."""
        if self.control not in _relcaches:
            with suppress(OSError), Tree.open(self.path / WARM) as saved:
                _relcaches[self.control] = file_copy.list_tree(saved).files
        return _relcaches.get(self.control, ())

    def learn(self, data: Tree) -> None:
        """Save the relation cache files of a server on this image whose clients only connected.

        Their contents depend on the catalogs only, so they fit every copy.
        """
        with self._locked(), Tree.open(self.path) as image:
            fresh = f"{WARM}.building"
            image.remove(fresh)
            try:
                _copy_relcache(data, image, fresh)
                if image.status(WARM) is None:
                    image.rename(fresh, WARM)
            except (OSError, ChangedError):  # such as a full disk; it is only an optimization
                image.remove(fresh)

    @contextmanager
    def _undamaged(self) -> Iterator[Tree]:
        with self._locked(shared=True):
            try:
                data = Tree.open(self.path / DATA)
            except OSError as error:
                raise ChangedError(f"{self.path / DATA}: {error.strerror}") from error
            with data:
                if control_hash(data) != self.control:
                    raise ChangedError(f"{data.path}/{CONTROL} differs from the published file")
                yield data

    def discard(self) -> None:
        """Remove a damaged image."""
        with self._locked(), Tree.open(self.path.parent) as images:
            images.remove(self.path.name)

    def set_password(self, target: Tree, verifier: str) -> bool:
        """Write the superuser's verifier into a copy on which no server has started yet.

        Returns False if SQL is required. initdb has stored a verifier of the same length; nothing
        points into its row, and page checksums are off, so the result is the same as that of ALTER
        ROLE. No connection is needed, which saves a seventh of the time to the first row.
        """
        if self.password is None or len(verifier) != _VERIFIER_LENGTH:
            return False
        name, offset = self.password
        target.patch(name, offset, verifier.encode("ascii"))
        return True

    def _locked(self, *, shared: bool = False) -> AbstractContextManager[object]:
        return nullcontext() if self.lock is None else locks.locked(self.lock, shared=shared)

    def repair(self, damage: ChangedError) -> None:
        raise ClusterError(f"{self.path} is damaged: {damage}", remedy="start again")


_relcaches: dict[str, tuple[tuple[str, int], ...]] = {}


def _is_late(directory: str) -> bool:
    """Whether the files of a directory are copied while the server starts."""
    return directory.startswith(_BASE)


def _copy_relcache(data: Tree, image: Tree, name: str) -> None:
    """Copy a data directory's relation cache files to a new directory. Raises OSError."""
    entries = data.entries("base")
    databases = [f"{_BASE}{last}" for last, status in entries if stat.S_ISDIR(status.st_mode)]
    found = []
    for above in (_GLOBAL, *databases):
        status = data.status(f"{above}/{RELCACHE}")
        if status is not None and stat.S_ISREG(status.st_mode) and status.st_size < _RELCACHE_BYTES:
            found.append((above, status.st_size))
    dirs = ("base", *(above for above, _ in found))
    files = tuple((f"{above}/{RELCACHE}", size) for above, size in found)
    image.make_directory(name)
    with image.below(name) as saved:
        file_copy.copy_listing(data, saved, Listing(dirs, files))
