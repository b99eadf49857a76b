"""The agent for the peers in Python: `agent.py PEER`. What it is asked is in the README above."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import psycopg
from peer import Cannot, Peer
from servers import SERVERS

from databases import DATABASES

REST_SECONDS = 0.1  # ahead of a database that is asked for alone, so that one may be ready
WORK_SECONDS = 0.025
COUNT = "SELECT count(*) FROM t0"


class Agent:
    """Takes the times of one peer."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._held = ExitStack()

    def obey(self, words: list[str]) -> dict[str, Any]:
        match words:
            case ["prepare"]:
                self._peer.prepare()
                return {}
            case ["server"]:
                return {"ms": self._timed(self._peer.server, lambda one: one.uri, "SELECT 1")}
            case ["hold"]:
                return self._hold()
            case ["database"]:
                self._peer.template("fifty")
                time.sleep(REST_SECONDS)
                return {"ms": self._timed(self._database, lambda uri: uri, COUNT)}
            case ["database-asyncpg"]:
                self._peer.template("fifty")
                time.sleep(REST_SECONDS)
                return {"ms": self._peer.asyncpg(COUNT)}
            case ["keep", count]:
                self._peer.template("fifty")
                for _ in range(int(count)):
                    self._held.enter_context(self._database())
                return {}
            case ["sustained", count, clients, content]:
                self._peer.template(content)
                return {"ms": self._peer.sustained(int(count), int(clients), content)}
            case ["suite", count, kind]:
                self._peer.template("fifty")
                return {"ms": self._suite(int(count), kind == "waiting")}
            case _:
                raise ValueError(f"no such command: {' '.join(words)}")

    def end(self) -> None:
        self._held.close()
        self._peer.end()

    def _database(self) -> AbstractContextManager[str]:
        return self._peer.database("fifty")

    def _timed(
        self, make: Callable[[], AbstractContextManager[Any]], uri: Callable[[Any], str], query: str
    ) -> float:
        begun = time.perf_counter()
        with make() as one, psycopg.connect(uri(one)) as connection:
            connection.execute(query).fetchone()  # type: ignore[arg-type]
            return (time.perf_counter() - begun) * 1000

    def _hold(self) -> dict[str, Any]:
        begun = time.perf_counter()
        server = self._held.enter_context(self._peer.server())
        with psycopg.connect(server.uri) as connection:
            connection.execute("SELECT 1").fetchone()
            taken = (time.perf_counter() - begun) * 1000
        return {"ms": taken, "pid": server.pid, "places": server.places}

    def _suite(self, count: int, waiting: bool) -> float:
        begun = time.perf_counter()
        for number in range(count):
            with self._peer.connection("fifty") as connection:
                connection.execute("INSERT INTO t0 VALUES (%s, 1, 1, 1)", [number])
                if waiting:
                    time.sleep(WORK_SECONDS)
                if connection.execute(COUNT).fetchone() != (1,):
                    raise RuntimeError("the database is not fresh")
        return (time.perf_counter() - begun) * 1000


def main() -> None:
    agent = Agent({**SERVERS, **DATABASES}[sys.argv[1]]())
    answers, sys.stdout = sys.stdout, sys.stderr  # peers print
    for line in sys.stdin:
        try:
            said = agent.obey(line.split())
        except Cannot as error:
            said = {"error": f"cannot: {error}"}
        except Exception as error:
            traceback.print_exc()
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), file=answers, flush=True)
    agent.end()


if __name__ == "__main__":
    main()
