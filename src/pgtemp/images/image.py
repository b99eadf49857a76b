"""Images: data directories in the cache, from which the data directories of servers are copied.

    images/<key>/manifest.json   the list of files, with sizes, and the control file's hash
    images/<key>/data/           a data directory, shut down cleanly
    images/<key>/warm/           relation cache files, added once the server runs

initdb.py builds them, and cache.py finds and removes them.

An image is copied in four parts, because a postmaster that starts after a clean shutdown does not
read the databases: `begin` copies the files that it needs to start; `first`, while it starts, the
database `postgres`; `rest` the templates, while the first connection is already in use; `warm` the
relation cache files, so that this connection need not build the cache (start-up deletes these
files, so they are added after it). Together this halves the time to the first row.

Each directory of the copy is given to the server user when it is complete. Until then the server
may read it, because start-up searches each database for files of a crashed server.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pgtemp.errors import ClusterError, OptionError
from pgtemp.host import file_copy, locks, procfs, reach
from pgtemp.host.file_copy import ChangedError, Listing
from pgtemp.host.tree import Tree
from pgtemp.supervisor.leftovers import DATA

WARM = "warm"
RELCACHE = "pg_internal.init"
CONTROL = "global/pg_control"
CONF = "postgresql.conf"
# Not copied: files of a running server, and the server logs of an earlier one.
NEVER_COPIED = ("postmaster.pid", "postmaster.opts", "log")
VERIFIER_LENGTH = 133
POSTGRES_OID = 5  # the oid of the database postgres in all clusters since PostgreSQL 15
_RELCACHE_BYTES = 4 << 20  # the limit for one file; usually one has 200 KB
_SHORT = 4096
_CONTROL_BYTES = 8192  # PG_CONTROL_FILE_SIZE
_LOOK_INTO = 0o755  # mode of an incomplete directory; other users cannot enter the data directory


class Source(Protocol):
    """A source from which a server's data directory is copied."""

    @property
    def identity(self) -> str:
        """A text that identifies the source; the same for the same bytes."""

    def resolve(self) -> Copyable:
        """The object to copy, which does not change during the copy; built if there is none.

        Raises:
            PgTempError: it cannot be built.
        """

    def repair(self, damage: ChangedError) -> None:
        """Rebuild the damaged source, or raise ClusterError."""


class Copyable(Protocol):
    """A data directory that is copied in parts, each at its time. All methods raise OSError."""

    @property
    def extent(self) -> tuple[int, int]:
        """The number of bytes and the number of files."""

    def begin(self, target: Tree) -> None: ...
    def first(self, target: Tree) -> None: ...
    def rest(self, target: Tree) -> None: ...
    def warm(self, target: Tree) -> None: ...
    def set_password(self, target: Tree, verifier: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Directory:
    """A data directory that a user prepared; it is copied completely and never changed."""

    path: Path

    @property
    def identity(self) -> str:
        with reach.open_tree(self.path) as data:
            return f"{self.path} {control_hash(data)}"

    @property
    def uid(self) -> int:
        """The user to whom it belongs. Raises OSError."""
        with reach.open_tree(self.path) as data:
            return os.fstat(data.fd).st_uid

    @property
    def version(self) -> str:
        """The major version of PostgreSQL that created it. Raises OptionError."""
        try:
            with reach.open_tree(self.path) as data:
                return data.read("PG_VERSION", _SHORT).decode().strip()
        except (OSError, ValueError) as error:
            raise OptionError(
                f"{self.path} cannot be used as a data directory: {error}",
                remedy="name a data directory of PostgreSQL",
            ) from error

    def is_in_use(self) -> bool:
        """Whether the server that its postmaster.pid names is running."""
        try:
            with reach.open_tree(self.path) as data:
                return procfs.lives(int(data.read("postmaster.pid", _SHORT).split(b"\n")[0]))
        except (OSError, ValueError, OverflowError):
            return False

    @property
    def extent(self) -> tuple[int, int]:
        with reach.open_tree(self.path) as data:
            listing = file_copy.list_tree(data, NEVER_COPIED)
        return listing.size, len(listing.files)

    def resolve(self) -> Copyable:
        return self

    def begin(self, target: Tree) -> None:
        with reach.open_tree(self.path) as data:
            listing = file_copy.list_tree(data, NEVER_COPIED)
            for name in listing.dirs:
                target.make_directory(name)
            file_copy.copy_files(data, target, listing.files)
        target.hand_over(*listing.dirs)

    def first(self, target: Tree) -> None:
        """Does nothing: `begin` has copied all; start-up reads the databases after a crash."""

    def rest(self, target: Tree) -> None:
        """Does nothing: `begin` has copied everything."""

    def warm(self, target: Tree) -> None:
        """Does nothing: there are no relation cache files for this directory."""

    def set_password(self, target: Tree, verifier: str) -> bool:
        """Does nothing, and returns False: the position of the verifier is unknown."""
        return False

    def repair(self, damage: ChangedError) -> None:
        raise ClusterError(
            f"{self.path} changed while it was copied: {damage}",
            remedy="stop the server that runs on it first",
        )


@dataclass(frozen=True, slots=True)
class Image:
    """A data directory that was shut down cleanly, and is copied many times.

    Attributes:
        conf: the text for postgresql.conf; None if the data directory contains the file.
        password: the file and the offset of the superuser's verifier.
        lock: the lock file, if other processes may build or remove the image.
    """

    path: Path
    dirs: tuple[str, ...]
    early: tuple[tuple[str, int], ...]
    postgres: tuple[tuple[str, int], ...]
    templates: tuple[tuple[str, int], ...]
    control: str
    conf: str | None = None
    password: tuple[str, int] | None = None
    lock: Path | None = None

    @property
    def identity(self) -> str:
        return self.control

    @property
    def files(self) -> tuple[tuple[str, int], ...]:
        """All files that are copied, with their sizes."""
        return (*self.early, *self.postgres, *self.templates)

    @property
    def extent(self) -> tuple[int, int]:
        return sum(size for _, size in self.files), len(self.files)

    def resolve(self) -> Copyable:
        return self

    def begin(self, target: Tree) -> None:
        """Copy the files that a postmaster needs to start. Raises ChangedError if damaged."""
        with self._undamaged() as data:
            os.utime(self.path)  # records the time of use, for pruning
            for name in self.dirs:
                late = _is_late(name) and target.gid is not None
                target.make_directory(name, _LOOK_INTO if late else 0o700)
            file_copy.copy_files(data, target, self.early)
        if self.conf is not None:
            target.write(CONF, self.conf.encode(errors="surrogateescape"))
        # From here on the server's user can rename directories, so these stay open.
        target.hold(_GLOBAL, *filter(_is_late, self.dirs))
        target.hand_over(*(name for name in self.dirs if not _is_late(name)))

    def first(self, target: Tree) -> None:
        """Copy the database `postgres`. Raises ChangedError if the image is damaged."""
        with self._undamaged() as data:
            file_copy.copy_files(data, target, self.postgres)
        target.hand_over(_OF_POSTGRES)

    def rest(self, target: Tree) -> None:
        """Copy the templates. Raises ChangedError if the image is damaged."""
        with self._undamaged() as data:
            # In one thread, because the server and its first client need the other core.
            file_copy.copy_files(data, target, self.templates, threads=1)
        target.hand_over(*(name for name in self.dirs if _is_late(name) and name != _OF_POSTGRES))

    def warm(self, target: Tree) -> None:
        """Add the relation cache files, unless the server has created its own already."""
        files = self.relcache
        if not files:
            return
        with suppress(FileNotFoundError), Tree.open(self.path / WARM) as saved:
            for file in files:
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
        """Save the relation cache files of a server on this image to which clients only connected.

        Their contents depend on the catalogs only, so they fit every copy.
        """
        with self._locked(), Tree.open(self.path) as place:
            fresh = f"{WARM}.building"
            place.remove(fresh)
            try:
                _copy_relcache(data, place, fresh)
                if place.status(WARM) is None:
                    place.rename(fresh, WARM)
            except (OSError, ChangedError):  # such as a full disk: only an optimization
                place.remove(fresh)

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
        """Put the superuser's verifier into a copy that no server has started on.

        initdb stored one of the same length, in a row that nothing points into and with page
        checksums off, so the result is the same as that of ALTER ROLE. It needs no connection,
        which saves a seventh of the time to the first row. Returns False if SQL is required.
        """
        if self.password is None or len(verifier) != VERIFIER_LENGTH:
            return False
        name, offset = self.password
        target.patch(name, offset, verifier.encode("ascii"))
        return True

    def _locked(self, *, shared: bool = False) -> AbstractContextManager[object]:
        return nullcontext() if self.lock is None else locks.locked(self.lock, shared=shared)

    def repair(self, damage: ChangedError) -> None:
        raise ClusterError(f"{self.path} is damaged: {damage}", remedy="start again")


_relcaches: dict[str, tuple[tuple[str, int], ...]] = {}
_BASE, _GLOBAL = "base/", "global"
_OF_POSTGRES = f"{_BASE}{POSTGRES_OID}"


def _is_late(directory: str) -> bool:
    """Whether a directory's files are copied while the server starts."""
    return directory.startswith(_BASE)


def divided(
    path: Path,
    listing: Listing,
    control: str,
    *,
    conf: str | None = None,
    password: tuple[str, int] | None = None,
    lock: Path | None = None,
) -> Image:
    """An image whose files are divided into those copied immediately and those copied later."""
    files = [one for one in listing.files if not one[0].endswith(RELCACHE)]
    early = tuple(one for one in files if not one[0].startswith(_BASE))
    postgres = tuple(one for one in files if one[0].startswith(f"{_OF_POSTGRES}/"))
    taken = {*early, *postgres}
    rest = tuple(one for one in files if one not in taken)
    return Image(path, listing.dirs, early, postgres, rest, control, conf, password, lock)


def control_hash(data: Tree) -> str:
    """The hash of the control file, which contains the state and the system identifier."""
    try:
        return hashlib.sha256(data.read(CONTROL, _CONTROL_BYTES)).hexdigest()
    except OSError:
        return ""


def _copy_relcache(data: Tree, place: Tree, name: str) -> None:
    """Copy a data directory's relation cache files to a new directory. Raises OSError."""
    databases = [f"{_BASE}{last}" for last, status in data.entries("base") if _is_dir(status)]
    found = []
    for above in (_GLOBAL, *databases):
        status = data.status(f"{above}/{RELCACHE}")
        if status is not None and stat.S_ISREG(status.st_mode) and status.st_size < _RELCACHE_BYTES:
            found.append((above, status.st_size))
    place.make_directory(name)
    place.make_directory(f"{name}/base")
    for above, _ in found:
        place.make_directory(f"{name}/{above}")
    with place.below(name) as saved:
        file_copy.copy_files(data, saved, [(f"{above}/{RELCACHE}", size) for above, size in found])


def _is_dir(status: os.stat_result) -> bool:
    return stat.S_ISDIR(status.st_mode)
