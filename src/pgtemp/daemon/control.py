"""What `pgtemp ls` asks a running daemon, over a socket in the daemon's home.

Whoever connects is told all there is to tell, as one JSON object, and hung up on. The home's mode
says who may.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

NAME = "control"
_SECONDS = 5.0
_MOST = 1 << 16  # bytes read at a time


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
    if not (home / NAME).exists():
        return None
    # By a descriptor: the path of the home may be too long for a socket.
    directory = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(_SECONDS)
            asking.connect(f"/proc/self/fd/{directory}/{NAME}")
            said = bytearray()
            while data := asking.recv(_MOST):
                said += data
        answer: dict[str, Any] = json.loads(said)
    except (OSError, ValueError):
        return None
    finally:
        os.close(directory)
    return answer
