"""Recycling: restore directories of dropped databases to their template's state, for new clones.

Most tests change only a few files of a database. Restoring those takes a fraction of the time
needed to remove hundreds of files and copy them again. `templates/recycle.py` decides when a
directory may be moved, and runs the SQL; this module handles the files:

    recycled/*/original/  the template's files, as a clone had them; they never change
    recycled/*/16412/     a database's directory, after that database was dropped

Every restored file gets a fixed, artificial modification time, and the recycler remembers when it
was last changed (ctime), which programs cannot set. A file with other times has been written to
since, by any process, and is restored again.

The recycler is a process of its own that the supervisor forks. It runs as the server user, because
a superuser in the server can put links into the directories. It imports no module that is slow to
import.
"""

from __future__ import annotations

import _socket
import os
import select
import stat
from itertools import islice

from pgtemp.host.openat import Closing
from pgtemp.host.removal import REMOVING, removal, remove
from pgtemp.supervisor.leftovers import DATA, RECYCLED
from pgtemp.supervisor.protocol import decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_MARK = 7_000_000_007  # nanoseconds since the epoch
_STUB = "PG_VERSION"  # PostgreSQL does not accept a database directory without it
# Milliseconds without a request, after which everything except the original is removed.
_IDLE = 10_000
_ORIGINAL = "original"
_CHUNK = 1 << 20
# The maximum number of entries, in addition to the template's, that are removed from a directory.
_EXTRA = 1000
_PORTION = 100  # the number of entries of a directory that are removed between two requests


class Recycler:
    """The recycled directories of one template's clones; methods raise OSError."""

    def __init__(self, run_dir: str) -> None:
        self._base = os.path.join(run_dir, DATA, "base")
        self._path = os.path.join(run_dir, RECYCLED)  # after `begin`, a directory in it
        self._sizes: dict[str, int] = {}
        self._taken: set[str] = set()
        self._changed_at: dict[str, dict[str, int]] = {}  # of restored files, by directory
        self.waiting: list[str] = []  # directories to be restored
        self._ready: list[str] = []
        self._removals: list[Iterator[None]] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self._removals)

    def begin(self, oid: str) -> None:
        """Move a clone's files to `original`; the clone remains as a stub with one file."""
        self._path = os.path.join(self._path, oid)
        os.makedirs(self._path, 0o700)
        original, stub = self._on(_ORIGINAL), self._at(oid)
        os.mkdir(original, 0o700)
        sizes = {}
        for name, status in _files(stub):
            if not stat.S_ISREG(status.st_mode):
                raise FileExistsError(f"{stub}/{name} is not a regular file")
            sizes[name] = status.st_size
            if name != _STUB:
                os.rename(f"{stub}/{name}", f"{original}/{name}")
        _copy(f"{stub}/{_STUB}", f"{original}/{_STUB}", sizes[_STUB])
        self._sizes = sizes

    def take(self, oid: str) -> None:
        """Move away the directory of a database that has no sessions and accepts none."""
        os.rename(self._at(oid), self._on(oid))
        self._taken.add(oid)

    def restore(self, oid: str) -> None:
        """Queue a directory for restoring: its database is dropped, so its files are not in use."""
        self._taken.remove(oid)
        self.waiting.append(oid)

    def put(self, oid: str) -> None:
        """Replace the directory of a database cloned from the stub by a restored directory."""
        if not self._ready and self.waiting:
            self._restore_next()
        restored = self._ready.pop() if self._ready else None
        if restored is None:
            raise FileNotFoundError("there is no directory to recycle")
        empty = self._on(f"{oid}.stub")
        os.rename(self._at(oid), empty)
        os.rename(self._on(restored), self._at(oid))
        self._changed_at[oid] = self._changed_at.pop(restored)
        remove(empty)

    def work(self) -> None:
        """Restore one directory, or remove a portion of a discarded one."""
        if self.waiting:
            self._restore_next()
        elif len(list(islice(self._removals[0], _PORTION))) < _PORTION:
            del self._removals[0]

    def _restore_next(self) -> None:
        oid = self.waiting.pop(0)
        known = self._changed_at.pop(oid, {})
        try:
            self._changed_at[oid] = self._restore_files(self._on(oid), known)
        except OSError:  # such as a full disk
            self._removals.append(removal(self._on(oid)))
        else:
            self._ready.append(oid)

    def clear(self) -> None:
        """Remove every directory except the original."""
        for oid in (*self._ready, *self.waiting, *self._taken):
            remove(self._on(oid))
        self._ready.clear()
        self.waiting.clear()
        self._taken.clear()
        self._changed_at.clear()

    def leave(self, _: str) -> None:
        """Remove everything, including the original."""
        remove(self._path)

    def _restore_files(self, directory: str, known: dict[str, int]) -> dict[str, int]:
        """Restore the files that were changed; return when each was last changed.

        Args:
            known: when each file was last changed by the recycler.
        """
        sizes, original, changed_at = self._sizes, self._on(_ORIGINAL), {}
        missing = set(sizes)
        for count, (name, status) in enumerate(_files(directory)):
            if count > 2 * len(sizes) + _EXTRA:
                raise OSError(f"{directory} has many more files than its template")
            size = sizes.get(name)
            if stat.S_ISDIR(status.st_mode):
                # Whatever its size: no client waits while it is removed.
                moved = self._on(f"{os.urandom(8).hex()}{REMOVING}")
                os.rename(f"{directory}/{name}", moved)
                self._removals.append(removal(moved))
            elif size is None or not stat.S_ISREG(status.st_mode):
                remove(f"{directory}/{name}")
            elif (
                status.st_mtime_ns == _MARK
                and status.st_ctime_ns == known.get(name)
                and status.st_size == size
            ):
                missing.discard(name)
                changed_at[name] = status.st_ctime_ns
        for name in missing:
            changed_at[name] = _copy(f"{original}/{name}", f"{directory}/{name}", sizes[name])
        return changed_at

    def _at(self, oid: str) -> str:
        return f"{self._base}/{oid}"

    def _on(self, name: str) -> str:
        return f"{self._path}/{name}"


def _files(directory: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            yield entry.name, entry.stat(follow_symlinks=False)


def _copy(source: str, target: str, size: int) -> int:
    """Copy a file into an existing one, if there is one: its blocks are allocated already.

    Returns when the file was last changed (ctime), in nanoseconds since the epoch.
    """
    # O_NONBLOCK: a named pipe in place of the file causes an error instead of a wait.
    careful = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with (
        Closing(os.open(source, os.O_RDONLY | careful)) as reading,
        Closing(os.open(target, os.O_WRONLY | os.O_CREAT | careful, 0o600)) as writing,
    ):
        remaining = size
        while remaining > 0:
            data = os.read(reading, min(remaining, _CHUNK))
            if not data:
                raise OSError(f"{source} has become shorter")
            remaining -= len(data)
            while data:
                data = data[os.write(writing, data) :]
        os.ftruncate(writing, size)
        os.utime(writing, ns=(_MARK, _MARK))
        return os.fstat(writing).st_ctime_ns


def serve(channel: _socket.socket, run_dir: str) -> None:
    """Execute requests, each naming a method, until the other end of the channel is closed."""
    recycler, buffer = Recycler(run_dir), bytearray()
    do = {name: getattr(recycler, name) for name in ("begin", "take", "restore", "put", "leave")}
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    while True:
        if not poll.poll(0 if recycler.has_work else _IDLE):
            if recycler.has_work:
                recycler.work()
            else:
                recycler.clear()
            continue
        data = channel.recv(65536)
        if not data:
            return
        buffer += data
        while (message := decode(buffer)) is not None:
            try:
                do[message["do"]](message["oid"])
                error = ""
            except (OSError, KeyError) as reason:
                error = str(reason) or type(reason).__name__
            if message["answer"]:
                channel.sendall(encode({"error": error}))
