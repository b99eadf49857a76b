"""Copying files fast: in the kernel, by two threads.

Measured (741 files, 20 MB, tmpfs to tmpfs, two cores): one thread 23 ms, two 17 ms, three no
better; packing all into one file first saves 2 ms more and is not worth a second format.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pgtemp.host.identity import Identity

_THREADS = 2
_SMALL = 64  # files; fewer are not worth a thread


class ChangedError(Exception):
    """A file that was to be copied is missing or not of the size it should have."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What there is to copy: directories, parents first; files with their sizes in bytes."""

    dirs: tuple[str, ...]
    files: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        return sum(size for _, size in self.files)


def list_tree(root: Path, leave_out: Iterable[str] = ()) -> Listing:
    """List a tree, names relative to `root`; links are listed as what they lead to."""
    skip = frozenset(leave_out)
    dirs: list[str] = []
    files: list[tuple[str, int]] = []

    def walk(prefix: str) -> Iterator[None]:
        with os.scandir(root / prefix) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            name = f"{prefix}{entry.name}"
            if name in skip:
                continue
            status = entry.stat()
            if stat.S_ISDIR(status.st_mode):
                dirs.append(name)
                yield from walk(name + "/")
            elif stat.S_ISREG(status.st_mode):
                files.append((name, status.st_size))
        yield

    for _ in walk(""):
        pass
    return Listing(tuple(dirs), tuple(files))


def make_dirs(target: Path, dirs: Sequence[str], owner: Identity) -> None:
    """Make directories in `target`, each with mode 0700."""
    for name in dirs:
        path = f"{target}/{name}"
        os.mkdir(path, 0o700)
        owner.own(path)


def copy_files(
    source: Path,
    target: Path,
    files: Sequence[tuple[str, int]],
    owner: Identity,
    *,
    threads: int = _THREADS,
) -> None:
    """Copy files whose directories are there already; existing files are an error.

    Raises:
        ChangedError: a file of `source` is not what the listing says.
        OSError: the target cannot be written, for one because its disk is full.
    """
    failures: list[BaseException] = []

    def work(share: Sequence[tuple[str, int]]) -> None:
        try:
            for name, size in share:
                _copy_file(f"{source}/{name}", f"{target}/{name}", size, owner)
        except BaseException as error:
            failures.append(error)

    threads = threads if len(files) > _SMALL else 1
    helpers = [
        threading.Thread(target=work, args=(files[i::threads],), daemon=True)
        for i in range(1, threads)
    ]
    for helper in helpers:
        helper.start()
    work(files[::threads])
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]


def _copy_file(source: str, target: str, size: int, owner: Identity) -> None:
    writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if owner.switch:
            os.fchown(writing, owner.uid, owner.gid)
        if size == 0:
            return
        try:
            reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ChangedError(f"{source} is missing") from error
        try:
            copied = 0
            # One byte more than there should be, which tells a file that has grown.
            while (count := _send(writing, reading, copied, size + 1 - copied)) > 0:
                copied += count
                if copied >= size:
                    break
            if copied != size:
                raise ChangedError(f"{source} has {copied} bytes instead of {size}")
        finally:
            os.close(reading)
    finally:
        os.close(writing)


def _send(writing: int, reading: int, offset: int, count: int) -> int:
    try:
        return os.sendfile(writing, reading, offset, count)
    except OSError:  # not from file to file: macOS
        return os.write(writing, os.pread(reading, min(count, 1 << 20), offset))
