"""Users: the user as which PostgreSQL runs (the server user), and the directories it can enter.

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

# `nobody` exists on nearly every system, also in a minimal container without a `postgres` user.
_DEFAULT_USERS = ("postgres", "nobody")


@dataclass(frozen=True, slots=True)
class Identity:
    """A user as which PostgreSQL's programs run; `switch` is true if it is not the caller."""

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
        """What tells the files that programs of this user made from those of another user.

        A user can change what its own programs make, so no other user's server starts on that.
        """
        return [str(self.uid)] if self.switch else []

    def blocked_at(self, path: Path) -> Path | None:
        """The first directory of `path` that this user may not enter; None if there is none."""
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

    Raises OptionError if there is no such user, it is root, or the caller is not root.

    Args:
        run_as: a user's name, if the caller is root; None selects `postgres`, else `nobody`.
    """
    uid = os.geteuid()
    if uid != 0:
        name = name_of(uid)
        if run_as not in (None, name, str(uid)):
            raise OptionError(
                f"run_as={run_as!r}: only root can run PostgreSQL as another user",
                remedy=f"leave it out to run as {name}",
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
                remedy="name an ordinary user",
            )
        return Identity(entry.pw_uid, entry.pw_gid, entry.pw_name, switch=True)
    if run_as is not None:
        raise OptionError(
            f"run_as={run_as!r}: there is no such user",
            remedy=f"create it with `useradd --system {run_as}`, or leave run_as out",
        )
    raise OptionError(
        "PostgreSQL refuses to run as root, and there is neither a user `postgres` nor `nobody`",
        remedy="create one with `useradd --system postgres`, or name another with run_as "
        "(PGTEMP_RUN_AS)",
    )


def choose_uid(uid: int) -> Identity:
    """The user to run PostgreSQL as on data that belongs to user `uid`.

    Raises OptionError if the data belongs to another user, and the caller is not root.
    """
    return choose(None if uid == os.geteuid() else name_of(uid))


def become(uid: int) -> None:
    """Give up root's rights permanently and continue as another user.

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
    """A user's name; the number as text if the system has no name for it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
