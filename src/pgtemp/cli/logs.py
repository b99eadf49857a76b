"""The format of the daemon's log: lines for people, or one JSON object per line for programs."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime


class _Json(logging.Formatter):
    """Formats a record as one JSON object, with the data of a lease (`daemon/lease.py`)."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def set_up(level: str, *, as_json: bool) -> None:
    """Configure logging to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    lines = logging.Formatter("pgtemp: %(levelname)s: %(message)s")
    handler.setFormatter(_Json() if as_json else lines)
    logging.raiseExceptions = False  # failures to log, for example on a full disk, are ignored
    logging.basicConfig(level=level.upper(), handlers=[handler])
