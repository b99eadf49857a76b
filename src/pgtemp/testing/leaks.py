"""Find connections that are still open to a database after its test."""

from __future__ import annotations

import threading
import time

from pgtemp.database import Database
from pgtemp.errors import PgTempError
from pgtemp.host.peer_credentials import TELLS_PEERS, Peers

# A backend exits a few milliseconds after its client has closed the connection.
_GRACE_SECONDS = 0.25
_POLL_SECONDS = 0.002
_QUERY = """
SELECT host(client_addr), client_port, coalesce(nullif(application_name, ''), 'pid ' || pid),
  state, extract(epoch FROM now() - state_change)::float, left(query, 200)
FROM pg_stat_activity
WHERE datname = %s AND backend_type = 'client backend' AND pid <> ALL(%s) ORDER BY backend_start
"""


def left_open(database: Database) -> list[str]:
    """Describe the connections that a test left open to its database: application, state, query.

    The connections that the `Database` object itself opened do not count, and neither do those that
    the client has closed and whose backend is about to exit.
    """
    if database.closed or not database.was_shown:
        return []
    ours = [one.info.backend_pid for one in database.connections if not one.closed]
    port = database.info.port
    peers = Peers()
    deadline = time.monotonic() + _GRACE_SECONDS
    try:
        while True:
            try:
                with database.shared.connection() as connection:
                    rows = connection.execute(_QUERY, [database.dbname, ours]).fetchall()
            except PgTempError:  # the test has stopped its server
                return []
            still_open, unsure = [], False
            for address, client_port, *facts in rows:
                # For the unix socket, it cannot be determined whether the client has closed the
                # connection.
                if address is None or not TELLS_PEERS:
                    unsure = True
                elif peers.holder((address, client_port), (address, port)) is None:
                    continue
                still_open.append(_described(*facts))
            if not unsure or time.monotonic() > deadline:
                return still_open
            threading.Event().wait(_POLL_SECONDS)
    finally:
        peers.close()


def _described(client: str, state: str | None, seconds: float | None, query: str) -> str:
    last = f", last query: {' '.join(query.split())}" if query else ""
    return f"{client}: {state or 'starting'} for {seconds or 0:.1f} s{last}"
