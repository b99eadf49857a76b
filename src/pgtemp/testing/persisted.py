"""Where the databases of failed tests go, and how many runs of them stay."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from pgtemp.errors import ClusterError, OptionError
from pgtemp.host import identity, locks, procfs
from pgtemp.host.removal import remove
from pgtemp.options.pytest import SuiteOptions
from pgtemp.server import rundir
from pgtemp.supervisor.leftovers import LEASE

RUNS = 3  # whose databases stay, as pytest does with its temporary directories
_FOLDER = "pgtemp-failed"
_RUN = re.compile(r"\d{8}-\d{6}-\d+")


def directory_for(options: SuiteOptions, run: str) -> Path:
    """A directory for what one run keeps; those of the oldest runs go.

    Raises:
        PgTempError: it cannot be made, or is somebody else's.
    """
    owner = identity.choose(options.run_as)
    try:
        base = rundir.find_base(options.data_dir_prefix, owner, keep=True)
    except OptionError:  # on tmpfs, say, where servers may live but nothing is kept
        base = rundir.find_base(None, owner, keep=True)
    folder = base / _FOLDER
    try:
        folder.mkdir(mode=0o755, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise OptionError(
                f"{folder} is not a directory of yours", remedy="name another data_dir_prefix"
            )
        _forget(folder, besides=run)
        (folder / run).mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise ClusterError(f"{folder} cannot be used: {error.strerror}") from error
    return folder / run


def _forget(folder: Path, besides: str) -> None:
    """Remove all but the last runs; what somebody looks at, or still writes, stays."""
    names = (run.name for run in folder.iterdir() if run.name != besides)
    for name in sorted(filter(_RUN.fullmatch, names), reverse=True)[RUNS - 1 :]:
        run = folder / name
        if not procfs.lives(int(name.rpartition("-")[2])) and not any(
            locks.is_locked(lease) for lease in run.glob(f"*/{LEASE}")
        ):
            remove(run)
