"""Clients that send messages by the million: other clients are served, and SIGTERM is obeyed."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from flooding import COPY_DATA, KEY_UPDATES, PASSWORDS, WALSENDER, floods
from support import Daemon

DaemonType = type[Daemon]
PASSWORD = "open sesame"
SECONDS = 20.0  # a new client is served within this time
END_SECONDS = 5.0  # SIGTERM stops the daemon within this time


@pytest.fixture
def options(tmp_path: Path) -> Callable[[str], list[str]]:
    """The options of a daemon in which a kind of flood is possible."""
    (password := tmp_path / "password").write_text(PASSWORD)
    password.chmod(0o600)
    of_kind = {PASSWORDS: ["--password-file", str(password)], KEY_UPDATES: ["--tls", "auto"]}
    return lambda kind: of_kind.get(kind, [])


def is_served(served: Daemon) -> bool:
    """Whether a new client gets a database in which it can work."""
    with psycopg.connect(served.uri, password=PASSWORD, autocommit=True) as client:
        client.execute("CREATE TEMP TABLE t AS SELECT 1 AS n")
        return client.execute("SELECT n FROM t").fetchone() == (1,)


@pytest.mark.parametrize("kind", [COPY_DATA, PASSWORDS, KEY_UPDATES, WALSENDER])
def test_a_flood(
    daemon: DaemonType, options: Callable[[str], list[str]], tmp_path: Path, kind: str
) -> None:
    """Meanwhile other clients get databases, and SIGTERM stops the daemon in time."""
    served = daemon("--log-level", "info", *options(kind))
    try:
        with ThreadPoolExecutor(1) as thread, floods(kind, served.port, tmp_path):
            for _ in range(4):
                assert thread.submit(is_served, served).result(SECONDS)
            served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(END_SECONDS) == 0
    finally:
        _, errors = served.end(signal.SIGKILL)
    assert "Traceback" not in errors
    assert ("too many bytes without data" in errors) is (kind == KEY_UPDATES)
