"""The part of a server's log that is a test's own: its lines, and its statements with times."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pgtemp.server import status

# What makes a server log every statement with its time, in one line.
STATEMENTS = {"log_min_duration_statement": "0", "log_parameter_max_length": "1000"}
_MOST_BYTES = 4 << 20
_MOST_LINES = 60
# As config.py has it: time, [pid], user@database where there is one, the level.
_LINE = re.compile(r"^\d{4}-\d\d-\d\d [\d:.]+ \S+ \[\d+\] (?:\S*@(\S+) )?([A-Z]+\d?): +(.*)", re.S)
_DURATION = re.compile(r"duration: ([\d.]+) ms  (statement|parse|bind|execute)[^:]*: (.*)", re.S)
_CRASH = ("WARNING", "ERROR", "FATAL", "PANIC")
_CALM = ("DETAIL", "HINT", "CONTEXT", "STATEMENT", "LOCATION", "QUERY")


@dataclass(frozen=True, slots=True)
class Slice:
    """What was logged of one database.

    Attributes:
        lines: as they stand in the log.
        statements: each with its milliseconds.
    """

    lines: list[str]
    statements: list[tuple[float, str]]

    def text(self) -> str:
        """The last of the lines."""
        return "\n".join(_last(self.lines))

    def table(self) -> str:
        """The last of the statements, a line each, with their times in milliseconds."""
        return "\n".join(_last([f"{ms:10.3f} ms  {_indented(sql)}" for ms, sql in self.statements]))


def read(log: Path, offset: int, dbname: str) -> Slice:
    """What a log says of a database from some place on; where it has another form, all of it.

    Args:
        offset: bytes to leave out.
    """
    text = status.read_log(log, offset, _MOST_BYTES).decode("utf-8", "replace")
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
        where, level, said = match.groups()
        if level in _CALM and where == dbname:
            if counted and level == "DETAIL" and "arameters:" in said:
                ms, sql = statements[-1]
                statements[-1] = ms, f"{sql}  -- {said.partition(':')[2].strip()}"
            elif ours:
                lines.append(entry)
            continue
        ours = where == dbname or (where is None and _matters(level, said))
        counted = False
        if ours and (timed := _DURATION.match(said)):
            ours = False
            if timed[2] in ("statement", "execute"):
                counted = True
                statements.append((float(timed[1]), timed[3]))
        if ours:
            lines.append(entry)
    return Slice(lines, statements)


def _matters(level: str, said: str) -> bool:
    """Whether a line of no database says that the server is in trouble."""
    return level in _CRASH or "was terminated by signal" in said


def _entries(lines: list[str]) -> list[str]:
    """Lines with those that continue them, which begin with a tab."""
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
    left_out = len(lines) - _MOST_LINES
    return lines if left_out <= 0 else [f"… {left_out} before", *lines[left_out:]]
