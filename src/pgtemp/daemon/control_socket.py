"""What `pgtemp ls` asks a running daemon, over a socket in the `socket` directory of its home.

Whoever connects is told all there is to tell, as one JSON object, and hung up on. The home's mode
says who may. The command does not trust the answer: root asks the daemons of all users.
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
_MOST = 4 << 20  # bytes of the answers of one user's daemons
_LONGEST = 1024  # characters of a text in an answer
_LARGEST = 1 << 63  # a number in an answer is below


class _Answer(asyncio.Protocol):
    def __init__(self, tell: Callable[[], dict[str, Any]]) -> None:
        self._tell = tell

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        answering = cast(asyncio.WriteTransport, transport)  # uvloop's is none of asyncio's classes
        answering.write(json.dumps(self._tell()).encode())
        answering.close()


async def listen(directory: str, tell: Callable[[], dict[str, Any]]) -> asyncio.Server:
    """Answer whoever asks in `directory`."""
    loop = asyncio.get_running_loop()
    return await loop.create_unix_server(lambda: _Answer(tell), f"{directory}/{NAME}")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a daemon reports: where it serves, without its password, and its leases."""

    uri: str
    leases: Sequence[dict[str, Any]]


def ask(homes: Iterable[Path]) -> dict[Path, Answer]:
    """The answers of the daemons in these homes, asked all at once, within one second.

    A home without a daemon, or whose daemon does not answer in time, has no answer. Every user can
    put a socket there that answers slowly, endlessly or with anything, so the users of the homes
    share neither their turns nor the size of their answers, and an answer is checked field by
    field.
    """
    deadline = time.monotonic() + _SECONDS
    whole: list[_Asked] = []
    with ExitStack() as stack, selectors.DefaultSelector() as waiting:
        left: dict[int, int] = defaultdict(lambda: _MOST)
        for home in _in_turn(homes):
            with suppress(OSError):
                asked = _Asked.connect(home)
                stack.callback(asked.socket.close)
                waiting.register(asked.socket, selectors.EVENT_READ, asked)
        while waiting.get_map() and (seconds := deadline - time.monotonic()) > 0:
            for key, _ in waiting.select(seconds):
                asked = key.data
                data = asked.receive(left[asked.uid])
                if data:
                    left[asked.uid] -= len(data)
                    asked.said += data
                    continue
                waiting.unregister(asked.socket)
                asked.socket.close()
                if data is not None:
                    whole.append(asked)
    answers = {asked.home: _read(asked.said) for asked in whole}
    return {home: answer for home, answer in answers.items() if answer is not None}


def _in_turn(homes: Iterable[Path]) -> list[Path]:
    """The first home of each user, then the second of each: descriptors may not suffice for all."""
    ranks: Counter[int] = Counter()
    ranked = []
    for home in homes:
        with suppress(OSError):
            uid = home.lstat().st_uid
            ranks[uid] += 1
            ranked.append((ranks[uid], home))
    return [home for _, home in sorted(ranked)]


@dataclass(slots=True)
class _Asked:
    """A connection to the control socket of a home that belongs to the user `uid`."""

    home: Path
    uid: int
    socket: socket.socket
    said: bytearray = field(default_factory=bytearray)

    @classmethod
    def connect(cls, home: Path) -> Self:
        """Raises OSError, also where connecting would have to wait."""
        with inventory.opened(home) as directory, ExitStack() as on_failure:
            uid = os.fstat(directory).st_uid
            asking = on_failure.enter_context(socket.socket(socket.AF_UNIX))
            asking.setblocking(False)
            refuse_descriptors(asking)
            _connect(asking, home, directory)
            check_listener(asking, uid)
            on_failure.pop_all()
            return cls(home, uid, asking)

    def receive(self, most: int) -> bytes | None:
        """More of the answer; b"" at its end, None where it fails or is longer than `most`."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        return data if len(data) <= most else None


def _connect(asking: socket.socket, home: Path, directory: int) -> None:
    """Connect to the socket in a directory, by its descriptor: the path may be too long for a
    socket, and a link in its place would lead root to any socket."""
    if not hasattr(os, "O_PATH"):  # macOS
        asking.connect(f"{home}/{SOCKET}/{NAME}")
        return
    within = os.open(SOCKET, DIRECTORY, dir_fd=directory)
    try:
        there = os.open(NAME, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=within)
    finally:
        os.close(within)
    try:
        if not stat.S_ISSOCK(os.fstat(there).st_mode):
            raise ConnectionRefusedError(f"{home}/{SOCKET}/{NAME} is not a socket")
        asking.connect(f"/proc/self/fd/{there}")
    finally:
        os.close(there)


def _read(said: bytearray) -> Answer | None:
    try:
        answer = json.loads(said)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict):
        return None
    uri, leases = answer.get("uri"), answer.get("leases")
    if not isinstance(uri, str) or not isinstance(leases, list):
        return None
    facts = [_plain(lease) for lease in leases if isinstance(lease, dict)]
    return Answer(redact(uri[:_LONGEST]), facts)


def _plain(lease: dict[str, Any]) -> dict[str, Any]:
    """The facts of a lease, without any that is not a short text or a usual number (lease.py)."""
    facts = lease.items()
    return {name: value for name, value in facts if _is_plain(name) and _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST
    if isinstance(value, (int, float)):
        return -_LARGEST < value < _LARGEST  # and so neither infinite nor NaN
    return value is None
