"""Images: data directories that servers start on copies of.

    images/<key>/manifest.json   what there is, with sizes, and the control file's hash
    images/<key>/data/           a data directory, shut down cleanly
    images/<key>/warm/           relation cache files, put in place once the server runs

They are built by initdb.py and found again by cache.py.

A copy is made in four parts, because a postmaster does not read the databases while it starts
from a clean shutdown: `begin` is what it needs to start; `first`, copied while it starts, the
database `postgres`; `rest` the templates, copied while the first connection is already at work;
`warm` the files that spare that connection building its relation cache (start-up deletes them, so
they come after it). SingleServer that takes half of the time to the first row away.

A directory of the copy is given to the server's user when it is complete. Until then the server
may look into it, because start-up searches each database for files of a crashed server.
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
# Left out of every copy: what belongs to a running server, and the logs of an earlier one.
NEVER_COPIED = ("postmaster.pid", "postmaster.opts", "log")
VERIFIER_LENGTH = 133
POSTGRES_OID = 5  # of the database postgres, the same in all clusters since PostgreSQL 15
_RELCACHE_BYTES = 4 << 20  # of one file, at most; they have 200 KB
_SHORT = 4096
_CONTROL_BYTES = 8192  # PG_CONTROL_FILE_SIZE
_LOOK_INTO = 0o755  # while a directory is incomplete; the data directory above it is closed


class Source(Protocol):
    """What a server's data directory is copied from."""

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
    """The parts of a data directory, each copied at its time. All raise OSError."""

    @property
    def extent(self) -> tuple[int, int]:
        """How many bytes there are, in how many files."""

    def begin(self, target: Tree) -> None: ...
    def first(self, target: Tree) -> None: ...
    def rest(self, target: Tree) -> None: ...
    def warm(self, target: Tree) -> None: ...
    def set_password(self, target: Tree, verifier: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Directory:
    """A data directory that a user prepared: copied whole, never touched."""

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
        """The major version of PostgreSQL that made it. Raises OptionError."""
        try:
            with reach.open_tree(self.path) as data:
                return data.read("PG_VERSION", _SHORT).decode().strip()
        except (OSError, ValueError) as error:
            raise OptionError(
                f"{self.path} cannot be used as a data directory: {error}",
                remedy="name a data directory of PostgreSQL",
            ) from error

    def is_in_use(self) -> bool:
        """Whether the server that it notes is running."""
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
        """Nothing is left: where the shutdown was unclean, start-up reads the databases."""

    def rest(self, target: Tree) -> None:
        """Nothing is left."""

    def warm(self, target: Tree) -> None:
        """Nothing is known about its relation cache."""

    def set_password(self, target: Tree, verifier: str) -> bool:
        """Nothing is known about its users."""
        return False

    def repair(self, damage: ChangedError) -> None:
        raise ClusterError(
            f"{self.path} changed while it was copied: {damage}",
            remedy="end the server that runs on it first",
        )


@dataclass(frozen=True, slots=True)
class Image:
    """A data directory that was shut down cleanly, and is copied many times.

    Attributes:
        conf: the text for postgresql.conf; None if the file itself has it.
        password: the file and the offset of the superuser's verifier.
        lock: where other processes may build or remove the image.
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
        """Copy what a postmaster needs to start. Raises ChangedError where it is damaged."""
        with self._undamaged() as data:
            os.utime(self.path)  # for pruning
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
        """Copy the database `postgres`. Raises ChangedError where the image is damaged."""
        with self._undamaged() as data:
            file_copy.copy_files(data, target, self.postgres)
        target.hand_over(_OF_POSTGRES)

    def rest(self, target: Tree) -> None:
        """Copy the templates. Raises ChangedError where the image is damaged."""
        with self._undamaged() as data:
            # By one thread: the server and its first client need the other core.
            file_copy.copy_files(data, target, self.templates, threads=1)
        target.hand_over(*(name for name in self.dirs if _is_late(name) and name != _OF_POSTGRES))

    def warm(self, target: Tree) -> None:
        """Put the relation cache files in place, unless the server has made its own already."""
        files = self.relcache
        if not files:
            return
        with suppress(FileNotFoundError), Tree.open(self.path / WARM) as kept:
            for file in files:
                with suppress(FileExistsError, ChangedError):  # only a shortcut
                    file_copy.copy_files(kept, target, [file])

    @property
    def relcache(self) -> tuple[tuple[str, int], ...]:
        """The relation cache files known so far, with their sizes."""
        if self.control not in _relcaches:
            with suppress(OSError), Tree.open(self.path / WARM) as kept:
                _relcaches[self.control] = file_copy.list_tree(kept).files
        return _relcaches.get(self.control, ())

    def learn(self, data: Tree) -> None:
        """Keep the relation cache files of a server on this image that did nothing but connect.

        What is in them follows from the catalogs alone, so they fit every copy.
        """
        with self._locked(), Tree.open(self.path) as place:
            fresh = f"{WARM}.building"
            place.remove(fresh)
            try:
                _copy_relcache(data, place, fresh)
                if place.status(WARM) is None:
                    place.rename(fresh, WARM)
            except (OSError, ChangedError):  # no room: only a shortcut
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
                    raise ChangedError(f"{data.path}/{CONTROL} is not what was published")
                yield data

    def discard(self) -> None:
        """Remove a damaged image."""
        with self._locked(), Tree.open(self.path.parent) as images:
            images.remove(self.path.name)

    def set_password(self, target: Tree, verifier: str) -> bool:
        """Put the superuser's verifier into a copy that no server has started on.

        initdb stored one of the same length, in a row that nothing points into and with page
        checksums off, so this is what ALTER ROLE would leave; it takes no connection, which is
        a seventh of the time to the first row. False where it has to be done by SQL.
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
    """An image, its files divided into those that are copied at once and those that can wait."""
    files = [one for one in listing.files if not one[0].endswith(RELCACHE)]
    early = tuple(one for one in files if not one[0].startswith(_BASE))
    postgres = tuple(one for one in files if one[0].startswith(f"{_OF_POSTGRES}/"))
    taken = {*early, *postgres}
    rest = tuple(one for one in files if one not in taken)
    return Image(path, listing.dirs, early, postgres, rest, control, conf, password, lock)


def control_hash(data: Tree) -> str:
    """The hash of the control file, which holds the state and the system's identifier."""
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
    with place.below(name) as kept:
        file_copy.copy_files(data, kept, [(f"{above}/{RELCACHE}", size) for above, size in found])


def _is_dir(status: os.stat_result) -> bool:
    return stat.S_ISDIR(status.st_mode)
