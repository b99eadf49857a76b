"""The agent for the peers in Python: `agent.py PEER`. ../README.md describes its commands."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from contextlib import ExitStack
from typing import Any, TextIO

import psycopg
from databases import DATABASES
from peer import Cannot, Peer
from pglite import Pglite
from pgtemps import Clusters, Daemon
from servers import SERVERS

PEERS = {
    "pgtemp": Clusters,
    "pgtemp-daemon": Daemon,
    "py-pglite": Pglite,
    **SERVERS,
    **DATABASES,
}
REST_SECONDS = 0.1  # before a single database is requested, so that one may be ready
WORK_SECONDS = 0.025
COUNT = "SELECT count(*) FROM t0"


class Agent:
    """Measures the times of one peer."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._held = ExitStack()

    def run_command(self, words: list[str]) -> dict[str, Any]:
        match words:
            case ["prepare"]:
                self._peer.prepare()
                return {}
            case ["server"]:
                return {"ms": self._server()}
            case ["hold"]:
                return self._hold()
            case ["database"]:
                self._peer.template("fifty")
                time.sleep(REST_SECONDS)
                return {"ms": self._database()}
            case ["database-asyncpg"]:
                self._peer.template("fifty")
                time.sleep(REST_SECONDS)
                return {"ms": self._peer.asyncpg(COUNT)}
            case ["sustained", count, clients, ("empty" | "fifty") as content]:
                self._peer.template(content)
                return {"ms": self._peer.sustained(int(count), int(clients), content)}
            case ["suite", count, ("trivial" | "waiting") as kind]:
                self._peer.template("fifty")
                return {"ms": self._suite(int(count), kind == "waiting")}
            case _:
                raise ValueError(f"no such command: {' '.join(words)}")

    def end(self) -> None:
        self._held.close()
        self._peer.end()

    def _server(self) -> float:
        begun = time.perf_counter()
        with self._peer.server() as server, psycopg.connect(server.uri) as connection:
            connection.execute("SELECT 1").fetchone()
            return (time.perf_counter() - begun) * 1000

    def _hold(self) -> dict[str, Any]:
        begun = time.perf_counter()
        with ExitStack() as held:
            server = held.enter_context(self._peer.server())
            if server.pid is None:
                raise Cannot("its servers belong to another process")
            with psycopg.connect(server.uri) as connection:
                connection.execute("SELECT 1").fetchone()
                taken = (time.perf_counter() - begun) * 1000
            self._held.push(held.pop_all())
        return {"ms": taken, "pid": server.pid, "directories": server.directories}

    def _database(self) -> float:
        begun = time.perf_counter()
        with self._peer.connection("fifty") as connection:
            connection.execute(COUNT).fetchone()
            return (time.perf_counter() - begun) * 1000

    def _suite(self, count: int, waiting: bool) -> float:
        with self._peer.watched("fifty") as ended:
            begun = time.perf_counter()
            for number in range(count):
                self._one(number, waiting)
            return (ended() - begun) * 1000

    def _one(self, number: int, waiting: bool) -> None:
        with self._peer.test() as connection:
            connection.execute("INSERT INTO t0 VALUES (%s, 1, 1, 1)", [number])
            if waiting:
                time.sleep(WORK_SECONDS)
            if connection.execute(COUNT).fetchone() != (1,):
                raise RuntimeError("the database is not fresh")


def command_streams() -> tuple[TextIO, TextIO]:
    """The streams of commands and answers; processes that a peer starts do not use them."""
    commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return commands, answers


def main() -> None:
    commands, answers = command_streams()
    agent = Agent(PEERS[sys.argv[1]]())
    for line in commands:
        try:
            answer = agent.run_command(line.split())
        except Cannot as error:
            answer = {"error": f"cannot: {error}"}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    agent.end()


if __name__ == "__main__":
    main()
