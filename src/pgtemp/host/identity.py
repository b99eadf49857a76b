"""The user that PostgreSQL runs as (the server user), and the directories that it can enter.

PostgreSQL refuses to run as root. If root runs pgtemp (as in a container), pgtemp starts PostgreSQL
with the ids of another user. It never calls sudo or su, and never changes the mode of a directory
that it did not create.
"""

from __future__ import annotations

import os
import pwd
import stat
from dataclasses import dataclass
from pathlib import Path

from pgtemp.errors import OptionError

# `nobody` exists on nearly every system, even in a minimal container without a `postgres` user.
_DEFAULT_USERS = ("postgres", "nobody")


@dataclass(frozen=True, slots=True)
class Identity:
    """A user that PostgreSQL's programs run as; `switch` is true if it is not the caller."""

    uid: int
    gid: int
    name: str
    switch: bool

    @property
    def has_name(self) -> bool:
        """Whether the system has a name for this user, and not only a number."""
        return name_of(self.uid) != str(self.uid)

    @property
    def made_as(self) -> list[str]:
        """The part of a cache key that separates files created by this user's programs from others.

        A user can change the files that its own programs create, so no server of another user uses
        them.
        """
        return [str(self.uid)] if self.switch else []

    def blocked_at(self, path: Path) -> Path | None:
        """The first directory of `path` that this user cannot enter; None if there is none."""
        if not self.switch:
            return None
        for directory in [*reversed(path.parents), path]:
            try:
                status = directory.stat()
            except OSError:
                return directory
            if stat.S_ISDIR(status.st_mode) and not self._may_enter(status):
                return directory
        return None

    def _may_enter(self, status: os.stat_result) -> bool:
        if status.st_uid == self.uid:
            return bool(status.st_mode & stat.S_IXUSR)
        if status.st_gid == self.gid:
            return bool(status.st_mode & stat.S_IXGRP)
        return bool(status.st_mode & stat.S_IXOTH)


def choose(run_as: str | None) -> Identity:
    """The user to run PostgreSQL as.

    Raises OptionError if the user does not exist or is root, or if the caller is not root.

    Args:
        run_as: the name of a user, allowed only if the caller is root; None selects `postgres`, or
            `nobody` if that does not exist.
    """
    uid = os.geteuid()
    if uid != 0:
        name = name_of(uid)
        if run_as not in (None, name, str(uid)):
            raise OptionError(
                f"run_as={run_as!r}: only root can run PostgreSQL as another user",
                remedy=f"omit it to run as {name}",
            )
        return Identity(uid, os.getegid(), name, switch=False)
    for candidate in (run_as,) if run_as is not None else _DEFAULT_USERS:
        try:
            entry = pwd.getpwnam(candidate)
        except KeyError:
            continue
        if entry.pw_uid == 0:
            raise OptionError(
                f"run_as={run_as!r}: PostgreSQL refuses to run as root",
                remedy="specify an unprivileged user",
            )
        return Identity(entry.pw_uid, entry.pw_gid, entry.pw_name, switch=True)
    if run_as is not None:
        raise OptionError(
            f"run_as={run_as!r}: the user does not exist",
            remedy=f"create it with `useradd --system {run_as}`, or omit run_as",
        )
    raise OptionError(
        "PostgreSQL refuses to run as root, and neither the user `postgres` nor `nobody` exists",
        remedy="create one with `useradd --system postgres`, or specify another user with run_as "
        "(PGTEMP_RUN_AS)",
    )


def choose_uid(uid: int) -> Identity:
    """The user to run PostgreSQL as on data that belongs to user `uid`.

    Raises OptionError if the data belongs to another user, and the caller is not root.
    """
    return choose(None if uid == os.geteuid() else name_of(uid))


def become(uid: int) -> None:
    """Drop root privileges permanently and continue as another user.

    Raises OptionError if the system has no such user.
    """
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise OptionError(
            f"the system has no user {uid}",
            remedy="create that user, or change the owner of the directory (chown)",
        ) from None
    os.initgroups(entry.pw_name, entry.pw_gid)
    os.setgid(entry.pw_gid)
    os.setuid(uid)
    os.environ.update(HOME=entry.pw_dir, USER=entry.pw_name, LOGNAME=entry.pw_name)


def name_of(uid: int) -> str:
    """The name of a user; the number as a string if the system has no name for it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
