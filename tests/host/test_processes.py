"""Programs that run as the server user, and that this user can control."""

from __future__ import annotations

import os
import subprocess

import pytest

from pgtemp.host import processes
from pgtemp.host.identity import Identity

OTHER = Identity(64001, 64001, "other", switch=True)
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs programs as another user")


def test_a_program_with_endless_output_is_killed() -> None:
    """Its output does not fill the owner's memory."""
    done = processes.run(["/usr/bin/yes"], identity=OTHER, seconds=60)
    assert done.returncode < 0
    assert len(done.stdout) < processes._OUTPUT_BYTES + (1 << 17)


def test_a_program_runs_in_its_own_session() -> None:
    """Its user cannot reach the owner's terminal through it."""
    script = 'read -r _ _ _ _ _ session _ < /proc/self/stat; echo "$session"'
    done = processes.run(["/bin/bash", "-c", f"{script}; echo $$"], identity=OTHER)
    session, pid = done.stdout.split()
    assert session == pid != str(os.getsid(0))


def test_a_program_that_does_not_exit_is_killed() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run(["/bin/sleep", "600"], identity=OTHER, seconds=0.2)


def test_both_outputs_and_the_status_are_returned() -> None:
    done = processes.run(["/bin/sh", "-c", "cat; echo err >&2; exit 3"], identity=OTHER, stdin="in")
    assert (done.stdout, done.stderr, done.returncode) == ("in", "err\n", 3)


def test_standard_input_of_a_program_that_takes_long() -> None:
    """It runs for longer than the interval of the checks, and reads its input late."""
    checks: list[int] = []
    argv = ["/bin/sh", "-c", "sleep 1.5; cat"]
    done = processes.run(argv, stdin="all of it", check=lambda: checks.append(1))
    assert (done.stdout, checks) == ("all of it", [1])
