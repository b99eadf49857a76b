"""Messages between an owner and its helper processes: four bytes of length, then marshal.

Both ends run the same interpreter, which makes marshal's format safe here; json would take longer
to import than all else that a helper does.
"""

from __future__ import annotations

import marshal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def encode(message: dict[str, Any]) -> bytes:
    """One message as it goes over a channel."""
    body = marshal.dumps(message)
    return len(body).to_bytes(4, "big") + body


def decode(buffer: bytearray) -> dict[str, Any] | None:
    """Take one whole message off the front of `buffer`; None while there is none."""
    if len(buffer) < 4:
        return None
    end = 4 + int.from_bytes(buffer[:4], "big")
    if len(buffer) < end:
        return None
    message: dict[str, Any] = marshal.loads(bytes(buffer[4:end]))  # noqa: S302
    del buffer[:end]
    return message
