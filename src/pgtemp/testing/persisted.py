"""The directory of the persisted databases of failed tests, and the removal of old runs."""

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

RUNS = 3  # the number of runs whose databases remain, as for pytest's temporary directories
_FOLDER = "pgtemp-failed"
_RUN = re.compile(r"\d{8}-\d{6}-\d+")


def directory_for(options: SuiteOptions, run: str) -> Path:
    """Create the directory for the persisted databases of a run; remove those of the oldest runs.

    Raises PgTempError if it cannot be created, or belongs to another user.
    """
    owner = identity.choose(options.run_as)
    try:
        base = rundir.find_base(options.data_dir_prefix, owner, keep=True)
    except OptionError:  # for example a tmpfs, on which servers may run, but data is not persisted
        base = rundir.find_base(None, owner, keep=True)
    folder = base / _FOLDER
    try:
        folder.mkdir(mode=0o755, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise OptionError(
                f"{folder} is not a directory that you own", remedy="choose another data_dir_prefix"
            )
        _remove_old_runs(folder, current=run)
        (folder / run).mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise ClusterError(f"{folder} cannot be used: {error.strerror}") from error
    return folder / run


def _remove_old_runs(folder: Path, current: str) -> None:
    """Remove all runs except the last. A run that is active, or whose data is open, remains."""
    names = (run.name for run in folder.iterdir() if run.name != current)
    for name in sorted(filter(_RUN.fullmatch, names), reverse=True)[RUNS - 1 :]:
        run = folder / name
        if not procfs.lives(int(name.rpartition("-")[2])) and not any(
            locks.is_locked(lease) for lease in run.glob(f"*/{LEASE}")
        ):
            remove(run)
