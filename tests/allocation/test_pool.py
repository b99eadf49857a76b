"""The pool, over things that are only counted."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from pgtemp.allocation import pool as pool_module
from pgtemp.allocation.pool import Pool
from support import eventually


class Counters:
    """Makes numbers; `gate` holds the makers back, `broken` lets them fail."""

    recycles = False

    def __init__(self) -> None:
        self.made = 0
        self.ended: list[int] = []
        self.dead: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.broken = False
        self._lock = threading.Lock()

    def provision(self) -> int:
        self.gate.wait(10)
        if self.broken:
            raise RuntimeError("no more")
        with self._lock:
            self.made += 1
            return self.made

    def dispose(self, thing: int) -> None:
        self.ended.append(thing)

    def usable(self, thing: int) -> bool:
        return thing not in self.dead


def test_it_makes_ahead_and_hands_out_at_once() -> None:
    kind = Counters()
    pool = Pool(kind, ready=3)
    pool.renew()
    assert eventually(lambda: kind.made == 3)
    assert {pool.claim().result(1) for _ in range(3)} == {1, 2, 3}
    pool.close()
    assert sorted(kind.ended) == list(range(4, kind.made + 1))


def test_who_waits_longest_is_served_first() -> None:
    """With nothing ready, claims are answered in the order in which they came."""
    kind = Counters()
    kind.gate.clear()
    pool = Pool(kind, ready=0)
    order: list[int] = []
    claims: list[Future[int]] = []
    for i in range(5):
        claim = pool.claim()
        claim.add_done_callback(lambda _, i=i: order.append(i))  # type: ignore[misc]
        claims.append(claim)
    kind.gate.set()
    for claim in claims:
        claim.result(5)
    assert order == [0, 1, 2, 3, 4]
    pool.close()


def test_a_failure_reaches_who_waits_and_the_next_claim_tries_again() -> None:
    kind = Counters()
    kind.broken = True
    pool = Pool(kind, ready=1)
    with pytest.raises(RuntimeError, match="no more"):
        pool.claim().result(5)
    kind.broken = False
    assert pool.claim().result(5) > 0
    pool.close()


def test_what_died_in_the_pool_is_not_handed_out() -> None:
    kind = Counters()
    pool = Pool(kind, ready=2)
    pool.renew()
    assert eventually(lambda: kind.made == 2)
    kind.dead = {1, 2}
    assert pool.claim().result(5) not in kind.dead
    assert eventually(lambda: {1, 2} <= set(kind.ended))
    pool.close()


def test_a_claim_that_is_given_up_costs_nothing() -> None:
    """What was made for somebody who left serves the next."""
    kind = Counters()
    kind.gate.clear()
    pool = Pool(kind, ready=0)
    left, stays = pool.claim(), pool.claim()
    assert left.cancel()
    kind.gate.set()
    assert stays.result(5) in (1, 2)
    pool.close()
    assert len(kind.ended) == kind.made - 1


def test_given_back_it_serves_again() -> None:
    kind = Counters()
    pool = Pool(kind, ready=1)
    thing = pool.claim().result(5)
    assert eventually(lambda: kind.made == 2)
    pool.give_back(thing)
    assert {pool.claim().result(5), pool.claim().result(5)} >= {thing}
    pool.close()


def test_it_keeps_more_ready_while_many_are_wanted_and_fewer_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Never more than the most; back to the least when nobody asks, and the rest is disposed of."""
    monkeypatch.setattr(pool_module, "_SHRINK_SECONDS", 0.1)
    kind = Counters()
    pool = Pool(kind, ready=1, most=8)
    kind.gate.clear()
    claims = [pool.claim() for _ in range(20)]
    kind.gate.set()
    for claim in claims:
        claim.result(5)
    assert eventually(lambda: kind.made == 20 + 8)
    assert eventually(lambda: len(kind.ended) == 7)
    assert pool.claim().result(1) == 21
    pool.close()


def test_what_is_ready_is_renewed() -> None:
    """Nobody need ask for it."""
    kind = Counters()
    pool = Pool(kind, ready=2)
    pool.renew()
    assert eventually(lambda: kind.made == 2)
    kind.dead = {1, 2}
    pool.renew()
    assert eventually(lambda: kind.made == 4 and sorted(kind.ended) == [1, 2])
    pool.close()


def test_what_died_meanwhile_is_not_given_to_who_waits() -> None:
    kind = Counters()
    pool = Pool(kind, ready=0)
    thing = pool.claim().result(5)
    kind.gate.clear()
    waiting = pool.claim()
    kind.dead = {thing}
    pool.give_back(thing)
    kind.gate.set()
    assert waiting.result(5) != thing
    pool.close()


def test_what_is_to_be_ended_comes_first_where_that_makes_the_next_cheaper() -> None:
    kind = Counters()
    pool = Pool(kind, ready=1, pause=3600)  # an hour in which nothing is ended by itself
    first = pool.claim().result(1)
    kind.recycles = True
    pool.retire(first)
    pool.claim().result(1)
    assert eventually(lambda: kind.ended == [first])
    pool.close()
