"""Who is still connected to a database when its test has ended."""

from __future__ import annotations

import threading
import time

from pgtemp.database import Database
from pgtemp.errors import PgTempError
from pgtemp.host.peer_credentials import TELLS_PEERS, Peers

# A backend whose client has closed its connection is gone within some milliseconds.
_GRACE_SECONDS = 0.25
_POLL_SECONDS = 0.002
_QUERY = """
SELECT host(client_addr), client_port, coalesce(nullif(application_name, ''), 'pid ' || pid),
  state, extract(epoch FROM now() - state_change)::float, left(query, 200)
FROM pg_stat_activity
WHERE datname = %s AND backend_type = 'client backend' AND pid <> ALL(%s) ORDER BY backend_start
"""


def left_open(database: Database) -> list[str]:
    """The connections that a test has left open to its database: application, state, query.

    Those that the database has opened itself do not count, nor those whose client has closed them
    and whose backend is about to end.
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
                with database.works.admins.connection() as connection:
                    rows = connection.execute(_QUERY, [database.dbname, ours]).fetchall()
            except PgTempError:  # the test has ended its server
                return []
            open_ones, unsure = [], False
            for address, client_port, *told in rows:
                if address is None or not TELLS_PEERS:  # by the unix socket
                    unsure = True
                elif peers.holder((address, client_port), (address, port)) is None:
                    continue
                open_ones.append(_described(*told))
            if not unsure or time.monotonic() > deadline:
                return open_ones
            threading.Event().wait(_POLL_SECONDS)
    finally:
        peers.close()


def _described(who: str, state: str | None, seconds: float | None, query: str) -> str:
    last = f", last query: {' '.join(query.split())}" if query else ""
    return f"{who}: {state or 'starting'} for {seconds or 0:.1f} s{last}"
