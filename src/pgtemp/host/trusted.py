"""Check that only the owner and root can change a directory.

A directory is trusted if it belongs to the owner (the effective uid) or to root, and no other user
may write to it. The same applies to every directory in its path, including those that hold a
symbolic link and those that the link leads through: a user who may write to one of them can replace
the next one with another directory.

- A sticky directory, such as /tmp, is trusted within a path: only their owners can rename and
  remove its entries. The next entry must belong to the owner or root, even if it is a link.
- A group may write if it is the private group of the owner or of root, which Debian and Fedora
  create for each user: it has the user's name, no other member, and is no other user's primary
  group. A user without a name may have a group of the same number without a name. If the directory
  has an access control list, the group's mode bits apply to other users as well (acl(5)), so no
  group may write.
- In a user namespace that does not map root, the kernel reports the overflow uid as the owner of
  root's files, as for every user that is not mapped. In such a namespace, that uid is trusted like
  root, but not as the owner of an entry of a sticky directory.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path

from pgtemp.errors import OptionError
from pgtemp.host.identity import name_of

_MAX_LINKS = 40  # MAXSYMLINKS, linux/namei.h
_ACL = "system.posix_acl_access"
# The first belongs to the machine's root in every user namespace; the owner of the second can
# change every path.
_ROOTS_OWN = ("/proc/sys", "/")


def check(path: Path, what: str, remedy: str, *, sticky: bool) -> None:
    """Raise OptionError if `path` is not trusted.

    Args:
        path: an absolute path; only the part that exists is examined.
        what: the description of the directory for the error.
        remedy: how to choose another directory.
        sticky: whether the directory itself may be sticky.
    """
    if flaw := find_flaw(path, sticky=sticky):
        raise OptionError(
            f"{what} {path} is not safe from other users: {flaw}",
            remedy=f"{remedy}, or change its owner or mode (chown, chmod go-w)",
        )


def find_flaw(path: Path, *, sticky: bool) -> str | None:
    """The first directory in the path that is not trusted, and why; None if there is none."""
    to_do, links = _backwards(os.fspath(path)), 0
    at, is_open = "/", False  # the directory reached so far, and whether others may write to it
    while to_do:
        name = to_do.pop()
        if name == "..":  # `at` contains no links, and its parents have been examined
            at = os.path.dirname(at)
            is_open = _is_open(at, os.lstat(at))
            continue
        entry = os.path.join(at, name)
        try:
            status = os.lstat(entry)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return None  # it cannot be used; the caller reports the reason when it tries
        if status.st_uid not in _owners(entry_of_sticky=is_open and name != "/"):
            return f"{entry} belongs to user {name_of(status.st_uid)}"
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > _MAX_LINKS:
                return f"{entry}: {os.strerror(errno.ELOOP)}"
            to_do += _backwards(os.readlink(entry))
            continue
        at, is_open = entry, _is_open(entry, status)
        if is_open and not status.st_mode & stat.S_ISVTX:
            return _described(entry, status)
    return _described(at, os.lstat(at)) if is_open and not sticky else None


def _backwards(path: str) -> list[str]:
    names = [name for name in path.split("/") if name not in ("", ".")]
    return [*reversed(names), *(["/"] if path.startswith("/") else [])]


def _described(path: str, status: os.stat_result) -> str:
    return f"{path} is writable by other users (mode {stat.S_IMODE(status.st_mode):04o})"


def _owners(*, entry_of_sticky: bool) -> set[int]:
    owners = {0, os.geteuid()}
    if not entry_of_sticky:
        for path in _ROOTS_OWN:
            with suppress(OSError):  # there may be no /proc
                owners.add(os.stat(path).st_uid)
    return owners


def _is_open(path: str, status: os.stat_result) -> bool:
    """Whether other users may write to a directory."""
    if status.st_mode & stat.S_IWOTH:
        return True
    if not status.st_mode & stat.S_IWGRP:
        return False
    group = status.st_gid
    private = _is_private(group, os.geteuid()) or _is_private(group, 0)
    return not private or _has_acl(path)


def _is_private(group: int, uid: int) -> bool:
    user = name_of(uid)
    try:
        entry = grp.getgrgid(group)
    except KeyError:
        return group == uid and user == str(uid)
    if entry.gr_name != user or set(entry.gr_mem) - {user}:
        return False
    # Root's group is that of system accounts such as sync and halt on Fedora.
    return group == 0 or all(one.pw_uid == uid for one in pwd.getpwall() if one.pw_gid == group)


def _has_acl(path: str) -> bool:
    try:
        return bool(os.getxattr(path, _ACL))
    except (AttributeError, OSError):  # not Linux; the directory has none
        return False
