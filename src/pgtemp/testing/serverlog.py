"""The part of a server log that concerns one test: its lines, and its statements with durations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pgtemp.server import status

# Settings with which a server logs every statement and its duration in one line.
STATEMENTS = {"log_min_duration_statement": "0", "log_parameter_max_length": "1000"}
_MAX_BYTES = 4 << 20
_MAX_LINES = 60
# The format set in config.py: time, [pid], user@database if there is one, level.
_LINE = re.compile(r"^\d{4}-\d\d-\d\d [\d:.]+ \S+ \[\d+\] (?:\S*@(\S+) )?([A-Z]+\d?): +(.*)", re.S)
_DURATION = re.compile(r"duration: ([\d.]+) ms  (statement|parse|bind|execute)[^:]*: (.*)", re.S)
_TROUBLE = ("WARNING", "ERROR", "FATAL", "PANIC")
_CONTINUATIONS = ("DETAIL", "HINT", "CONTEXT", "STATEMENT", "LOCATION", "QUERY")


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a log that concerns one database.

    Attributes:
        lines: the unchanged lines of the log.
        statements: the statements, each with its duration in milliseconds.
    """

    lines: list[str]
    statements: list[tuple[float, str]]

    def text(self) -> str:
        """Return the last lines."""
        return "\n".join(_last(self.lines))

    def table(self) -> str:
        """Return the last statements, one per line, with their durations in milliseconds."""
        return "\n".join(_last([f"{ms:10.3f} ms  {_indented(sql)}" for ms, sql in self.statements]))


def read(log: Path, offset: int, dbname: str) -> Slice:
    """Return the part of a log that concerns a database, or all of it if its format is unknown.

    Args:
        offset: the number of bytes at the start of the log to skip.
    """
    text = status.read_log(log, offset, _MAX_BYTES).decode("utf-8", "replace")
    entries = _entries(text.splitlines())
    if not any(_LINE.match(entry) for entry in entries):
        return Slice(entries, [])
    lines: list[str] = []
    statements: list[tuple[float, str]] = []
    ours = counted = False
    for entry in entries:
        match = _LINE.match(entry)
        if match is None:
            continue
        logged_in, level, message = match.groups()
        if level in _CONTINUATIONS and logged_in == dbname:
            if counted and level == "DETAIL" and "arameters:" in message:
                ms, sql = statements[-1]
                statements[-1] = ms, f"{sql}  -- {message.partition(':')[2].strip()}"
            elif ours:
                lines.append(entry)
            continue
        ours = logged_in == dbname or (logged_in is None and _matters(level, message))
        counted = False
        if ours and (timed := _DURATION.match(message)):
            ours = False
            if timed[2] in ("statement", "execute"):
                counted = True
                statements.append((float(timed[1]), timed[3]))
        if ours:
            lines.append(entry)
    return Slice(lines, statements)


def _matters(level: str, message: str) -> bool:
    """Whether a line without a database name reports a failure of the server."""
    return level in _TROUBLE or "was terminated by signal" in message


def _entries(lines: list[str]) -> list[str]:
    """Join each line with its continuation lines, which start with a tab."""
    entries: list[str] = []
    for line in lines:
        if line.startswith("\t") and entries:
            entries[-1] += "\n" + line
        else:
            entries.append(line)
    return entries


def _indented(statement: str) -> str:
    return statement.replace("\n\t", "\n").replace("\n", "\n" + " " * 15)


def _last(lines: list[str]) -> list[str]:
    left_out = len(lines) - _MAX_LINES
    return lines if left_out <= 0 else [f"… {left_out} earlier", *lines[left_out:]]
