"""Messages between an owner and its supervisor or recycler: a length of four bytes, then marshal.

Both ends run the same interpreter, so marshal's format is safe here. Importing json would take
longer than all other work of such a process.
"""

from __future__ import annotations

import marshal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def encode(message: dict[str, Any]) -> bytes:
    """Encode one message for a channel."""
    body = marshal.dumps(message)
    return len(body).to_bytes(4, "big") + body


def decode(buffer: bytearray) -> dict[str, Any] | None:
    """Remove one complete message from the front of `buffer`; None if there is none yet."""
    if len(buffer) < 4:
        return None
    end = 4 + int.from_bytes(buffer[:4], "big")
    if len(buffer) < end:
        return None
    message: dict[str, Any] = marshal.loads(bytes(buffer[4:end]))  # noqa: S302
    del buffer[:end]
    return message
