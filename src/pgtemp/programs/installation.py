"""An installation of PostgreSQL: its programs, its version, and a copy that every user can run."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.version import Version

from pgtemp.errors import InstallationError
from pgtemp.host import disk_space, locks, paths
from pgtemp.host.identity import Identity
from pgtemp.host.progress import step
from pgtemp.programs import nameless_user


@dataclass(frozen=True, slots=True)
class Installation:
    """A directory that contains the PostgreSQL programs of one version."""

    bin_dir: Path
    version: str  # the end of `postgres --version`: "18.1", "15.18 (Debian 15.18-0+deb12u1)"

    @property
    def release(self) -> Version:
        return Version(self.version.split()[0].replace("devel", ".dev0"))

    @property
    def major(self) -> int:
        return self.release.major

    def extensions_stamp(self) -> str:
        """A string that changes whenever an extension package is installed, upgraded or removed."""
        shares = (
            self.bin_dir.parent / "share" / "extension",
            self.bin_dir.parent / "share" / "postgresql" / "extension",
            Path(f"/usr/share/postgresql/{self.major}/extension"),
        )
        return " ".join(str(share.stat().st_mtime_ns) for share in shares if os.path.exists(share))

    def program(self, name: str) -> Path:
        """The path of one program. Raises InstallationError if this installation lacks it."""
        path = self.bin_dir / name
        if not path.exists():
            raise InstallationError(
                f"{self.bin_dir} does not contain {name}",
                remedy=f"install PostgreSQL {self.major}'s client programs, or "
                "specify another directory (bin_dir, PGTEMP_BIN)",
            )
        return path

    @property
    def identity(self) -> str:
        """A string that identifies this build: the path, time, size and version of its server."""
        status = (self.bin_dir / "postgres").stat()
        return f"{self.bin_dir}|{status.st_mtime_ns}|{status.st_size}|{self.version}"

    def within_reach(self, owner: Identity) -> Installation:
        """Return this installation, or a copy of it that `owner` can run.

        The server user cannot enter a virtual environment in root's home directory, for example.
        Raises InstallationError if `owner` cannot run the copy either.
        """
        blocked = owner.blocked_at(self.bin_dir)
        if blocked is None:
            return self
        root, cache = self.bin_dir.parent, paths.cache_dir()
        target = cache / "programs" / hashlib.sha256(self.identity.encode()).hexdigest()[:16]
        copy = replace(self, bin_dir=target / root.parent.name / root.name / "bin")
        no_cache = ""
        if at := owner.blocked_at(copy.bin_dir.parent if copy.bin_dir.exists() else cache):
            no_cache = f"nor {at}, which contains the cache"
        elif paths.is_noexec(cache):
            no_cache = f"and the cache {cache} is mounted noexec, so no program there can be run"
        if no_cache:
            raise InstallationError(
                f"user {owner.name}, which PostgreSQL runs as, cannot enter {blocked}, which "
                f"contains the programs, {no_cache}",
                remedy="install PostgreSQL elsewhere, or set PGTEMP_CACHE_DIR to another directory",
            )
        with disk_space.writing(target.parent, disk_space.CACHE_REMEDY):
            paths.make_dirs(target.parent)
            with locks.locked(target.with_suffix(".lock")):
                if not copy.bin_dir.exists():
                    what = f"copying PostgreSQL {self.version}, so that {owner.name} can run it"
                    with step(what):
                        nameless_user.copy_for_all_users(root, target)
        return copy
