"""What `pgtemp ls` asks a running daemon, over a socket in the daemon's home.

Whoever connects is told all there is to tell, as one JSON object, and hung up on. The home's mode
says who may. Whoever asks trusts the user of the home alone, and no more than for a moment.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

NAME = "control"
_SECONDS = 5.0
_MOST = 16 << 20  # bytes that an answer may have
_CREDENTIALS = struct.Struct("3i")  # of SO_PEERCRED: pid, uid, gid


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


def ask(home: Path) -> dict[str, Any] | None:
    """What the daemon whose home this is says; None where it is none, or does not answer."""
    try:
        # By a descriptor: the path of the home may be too long for a socket.
        directory = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            near = f"/proc/self/fd/{directory}"
            there = near if os.path.isdir(near) else os.fspath(home)
            answer = json.loads(_ask(f"{there}/{NAME}", os.fstat(directory).st_uid))
        finally:
            os.close(directory)
    except (OSError, ValueError, RecursionError):
        return None
    return answer if _is_whole(answer) else None


def _ask(path: str, uid: int) -> bytes:
    deadline = time.monotonic() + _SECONDS
    said = bytearray()
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(_SECONDS)
        asking.connect(path)
        if hasattr(socket, "SO_PEERCRED"):
            size = _CREDENTIALS.size
            got = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
            if _CREDENTIALS.unpack(got)[1] != uid:
                raise PermissionError("somebody else answers")
        while data := asking.recv(1 << 16):
            said += data
            if len(said) > _MOST or time.monotonic() > deadline:
                raise TimeoutError("it says too much")
    return bytes(said)


def _is_whole(answer: object) -> bool:
    return (
        isinstance(answer, dict)
        and isinstance(answer.get("uri"), str)
        and isinstance(answer.get("leases"), list)
    )
