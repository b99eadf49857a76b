"""Serve the daemon's status to `pgtemp ls`, on a socket in its run directory (`socket/control`).

The daemon sends its URI, version and leases to every client of the socket, as one JSON object, and
disconnects. The mode of the run directory decides which users may connect. `pgtemp ls` does not
trust the answer: root queries the daemons of all users.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import socket
import stat
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

from pgtemp.host.openat import DIRECTORY
from pgtemp.host.peer_credentials import check_listener, refuse_descriptors
from pgtemp.supervisor import inventory
from pgtemp.supervisor.leftovers import SOCKET
from pgtemp.uri import redact

NAME = "control"
_SECONDS = 1.0  # for all answers together
_MAX_BYTES = 4 << 20  # of the answers of one user's daemons
_MAX_TEXT = 1024  # characters of a text in an answer
_MAX_NUMBER = 1 << 63  # the numbers in an answer are smaller


class _Answer(asyncio.Protocol):
    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._status = status

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not instances of asyncio's classes.
        answering = cast(asyncio.WriteTransport, transport)
        answering.write(json.dumps(self._status()).encode())
        answering.close()


async def listen(directory: str, status: Callable[[], dict[str, Any]]) -> asyncio.Server:
    """Listen on the control socket in `directory`, and send `status()` to each client."""
    loop = asyncio.get_running_loop()
    return await loop.create_unix_server(lambda: _Answer(status), f"{directory}/{NAME}")


@dataclass(frozen=True, slots=True)
class Answer:
    """A daemon's answer: its URI, without the password, and its leases."""

    uri: str
    leases: Sequence[dict[str, Any]]


def ask(run_dirs: Iterable[Path]) -> dict[Path, Answer]:
    """Query the daemons in these run directories concurrently, for at most one second.

    A run directory without a daemon, or whose daemon does not answer in time, is not in the result.
    Every user can put a socket there that answers slowly, endlessly or with any content. So each
    user has a limit of their own on the size of the answers, the first run directory of every user
    is queried before the second of any, and every field of an answer is checked.
    """
    deadline = time.monotonic() + _SECONDS
    complete: list[_Query] = []
    with ExitStack() as stack, selectors.DefaultSelector() as waiting:
        left: dict[int, int] = defaultdict(lambda: _MAX_BYTES)
        for run_dir in _in_turn(run_dirs):
            with suppress(OSError):
                query = _Query.connect(run_dir)
                stack.callback(query.socket.close)
                waiting.register(query.socket, selectors.EVENT_READ, query)
        while waiting.get_map() and (seconds := deadline - time.monotonic()) > 0:
            for key, _ in waiting.select(seconds):
                query = key.data
                data = query.receive(left[query.uid])
                if data:
                    left[query.uid] -= len(data)
                    query.received += data
                    continue
                waiting.unregister(query.socket)
                query.socket.close()
                if data is not None:
                    complete.append(query)
    answers = {query.run_dir: _read(query.received) for query in complete}
    return {run_dir: answer for run_dir, answer in answers.items() if answer is not None}


def _in_turn(run_dirs: Iterable[Path]) -> list[Path]:
    """Sort: the first run directory of each user, then the second, and so on.

    The process may have fewer descriptors than there are run directories.
    """
    ranks: Counter[int] = Counter()
    ranked = []
    for run_dir in run_dirs:
        with suppress(OSError):
            uid = run_dir.lstat().st_uid
            ranks[uid] += 1
            ranked.append((ranks[uid], run_dir))
    return [run_dir for _, run_dir in sorted(ranked)]


@dataclass(slots=True)
class _Query:
    """A connection to the control socket of a run directory that belongs to the user `uid`."""

    run_dir: Path
    uid: int
    socket: socket.socket
    received: bytearray = field(default_factory=bytearray)

    @classmethod
    def connect(cls, run_dir: Path) -> Self:
        """Connect. Raises OSError, even if connecting would only block, as the queue is full."""
        with inventory.opened(run_dir) as directory, ExitStack() as on_failure:
            uid = os.fstat(directory).st_uid
            asking = on_failure.enter_context(socket.socket(socket.AF_UNIX))
            asking.setblocking(False)
            refuse_descriptors(asking)
            _connect(asking, run_dir, directory)
            check_listener(asking, uid)
            on_failure.pop_all()
            return cls(run_dir, uid, asking)

    def receive(self, most: int) -> bytes | None:
        """Return more of the answer; b"" at its end, None if it fails or is longer than `most`."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        return data if len(data) <= most else None


def _connect(asking: socket.socket, run_dir: Path, directory: int) -> None:
    """Connect to the control socket by the descriptor of its directory.

    The path may be too long for a socket address, and a symbolic link in its place would direct
    root to any socket.
    """
    if not hasattr(os, "O_PATH"):  # macOS
        asking.connect(f"{run_dir}/{SOCKET}/{NAME}")
        return
    within = os.open(SOCKET, DIRECTORY, dir_fd=directory)
    try:
        there = os.open(NAME, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=within)
    finally:
        os.close(within)
    try:
        if not stat.S_ISSOCK(os.fstat(there).st_mode):
            raise ConnectionRefusedError(f"{run_dir}/{SOCKET}/{NAME} is not a socket")
        asking.connect(f"/proc/self/fd/{there}")
    finally:
        os.close(there)


def _read(received: bytearray) -> Answer | None:
    try:
        answer = json.loads(received)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict):
        return None
    uri, leases = answer.get("uri"), answer.get("leases")
    if not isinstance(uri, str) or not isinstance(leases, list):
        return None
    facts = [_plain(lease) for lease in leases if isinstance(lease, dict)]
    return Answer(redact(uri[:_MAX_TEXT]), facts)


def _plain(lease: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of a lease (lease.py) that are short texts, usual numbers or None."""
    facts = lease.items()
    return {name: value for name, value in facts if _is_plain(name) and _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= _MAX_TEXT
    if isinstance(value, (int, float)):
        return -_MAX_NUMBER < value < _MAX_NUMBER  # excludes infinity and NaN
    return value is None
