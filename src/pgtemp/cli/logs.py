"""How the daemon's log looks: lines for people, or a JSON object a line for programs."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime


class _Json(logging.Formatter):
    """One object a line; of a lease its facts too, by the names of `daemon/lease_manager.py`."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False)


def set_up(level: str, *, as_json: bool) -> None:
    """Log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    lines = logging.Formatter("pgtemp: %(levelname)s: %(message)s")
    handler.setFormatter(_Json() if as_json else lines)
    logging.raiseExceptions = False  # what cannot be logged, on a full disk, is no reason to end
    logging.basicConfig(level=level.upper(), handlers=[handler])
