"""The owners of servers on this machine: daemons, test runs, and other users of the library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgtemp.daemon import control_socket
from pgtemp.daemon.control_socket import Answer
from pgtemp.host import identity, procfs
from pgtemp.supervisor.inventory import Found
from pgtemp.uri import redact


@dataclass(frozen=True, slots=True)
class Owner:
    """A process and its servers.

    Attributes:
        pid: None if the owner has exited, and its supervisor is removing its servers.
        user: the user that PostgreSQL runs as.
        command: its command line, without passwords.
        age: seconds since its start.
        servers: the number of its servers.
        databases: the number of databases made in its servers, including those that are ready.
        size: bytes on disk of its servers.
        uri: a daemon's URI, without the password; None for other owners.
        leases: the facts of a daemon's leases, as in its log; None for other owners.
    """

    pid: int | None
    user: str
    command: str
    age: float | None
    servers: int
    databases: int
    size: int
    uri: str | None
    leases: Sequence[dict[str, Any]] | None


def of(homes: Iterable[Found]) -> list[Owner]:
    """Return the owners of the run directories in use, oldest first."""
    alive = [one for one in homes if one.lives and one.open]
    answers = control_socket.ask(one.path for one in alive)
    # Run directories without an owner process are grouped by user.
    grouped: dict[tuple[int | None, int], list[Found]] = {}
    for one in alive:
        user = one.uid if one.owner is None else -1
        grouped.setdefault((one.owner, user), []).append(one)
    found = [_owner(pid, run_dirs, answers) for (pid, _), run_dirs in grouped.items()]
    return sorted(found, key=lambda owner: -(owner.age or 0))


def _owner(pid: int | None, run_dirs: Sequence[Found], answers: Mapping[Path, Answer]) -> Owner:
    answer = next((answers[one.path] for one in run_dirs if one.path in answers), None)
    words = procfs.command(pid).split(" ") if pid is not None else []
    return Owner(
        pid=pid,
        user=identity.name_of(max(one.uid for one in run_dirs)),
        command=" ".join(redact(word) if "://" in word else word for word in words),
        age=procfs.age(pid) if pid is not None else None,
        servers=sum(bool(one.processes) for one in run_dirs),
        databases=sum(one.databases for one in run_dirs),
        size=sum(one.size for one in run_dirs),
        uri=answer.uri if answer is not None else None,
        leases=answer.leases if answer is not None else None,
    )
