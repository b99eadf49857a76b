"""Who has servers on this machine: daemons, test runs, whatever uses the library."""

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
        pid: None where the owner is gone, and its warden is taking its servers away.
        user: as whom PostgreSQL runs.
        command: its command line, passwords left out.
        age: seconds since it was started.
        databases: made in its servers, those that are kept ready too.
        size: bytes that its servers take.
        uri: where a daemon serves, without its password.
        leases: of a daemon, as its log tells them; None for others.
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
    """The owners of homes that live, oldest first."""
    alive = [one for one in homes if one.lives and one.open]
    answers = control_socket.ask(one.path for one in alive)
    # Without an owner, the homes of two users have nothing in common.
    grouped: dict[tuple[int | None, int], list[Found]] = {}
    for one in alive:
        whose = one.uid if one.owner is None else -1
        grouped.setdefault((one.owner, whose), []).append(one)
    found = [_owner(pid, theirs, answers) for (pid, _), theirs in grouped.items()]
    return sorted(found, key=lambda owner: -(owner.age or 0))


def _owner(pid: int | None, theirs: Sequence[Found], answers: Mapping[Path, Answer]) -> Owner:
    answer = next((answers[one.path] for one in theirs if one.path in answers), None)
    words = procfs.command(pid).split(" ") if pid is not None else []
    return Owner(
        pid=pid,
        user=identity.name_of(max(one.uid for one in theirs)),
        command=" ".join(redact(word) if "://" in word else word for word in words),
        age=procfs.age(pid) if pid is not None else None,
        servers=sum(bool(one.processes) for one in theirs),
        databases=sum(one.databases for one in theirs),
        size=sum(one.size for one in theirs),
        uri=answer.uri if answer is not None else None,
        leases=answer.leases if answer is not None else None,
    )
