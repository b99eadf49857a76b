"""Where the databases of failed tests go, and how many runs of them stay."""

from __future__ import annotations

import shutil
from pathlib import Path

from pgtemp.errors import OptionError
from pgtemp.host import identity, locks
from pgtemp.server import home
from pgtemp.server.remains import LEASE
from pgtemp.suiteoptions import SuiteOptions

RUNS = 3  # whose databases stay, as pytest does with its temporary directories
_FOLDER = "failed"


def directory_for(options: SuiteOptions, run: str) -> Path:
    """A directory for what one run keeps; those of the oldest runs go. Raises OptionError."""
    owner = identity.choose(options.run_as)
    try:
        base = home.find_base(options.data_dir_prefix, owner, keep=True)
    except OptionError:  # on tmpfs, say, where servers may live but nothing is kept
        base = home.find_base(None, owner, keep=True)
    folder = base / _FOLDER
    folder.mkdir(mode=0o755, exist_ok=True)
    _forget(folder, besides=run)
    (folder / run).mkdir(mode=0o755, exist_ok=True)
    return folder / run


def _forget(folder: Path, besides: str) -> None:
    """Remove all but the last runs; what somebody looks at stays."""
    runs = sorted((run.name for run in folder.iterdir() if run.name != besides), reverse=True)
    for name in runs[RUNS - 1 :]:
        run = folder / name
        if not any(locks.is_locked(lease) for lease in run.glob(f"*/{LEASE}")):
            shutil.rmtree(run, ignore_errors=True)
