"""Keep the next few of anything ready before anyone asks.

Made ahead by threads of its own, handed out in the order in which people asked, disposed of behind
their backs. Where people ask faster than it makes, it keeps more ready; when nobody asks for a
while, fewer again. Knows nothing of what it keeps but how to make it, how to end it, and whether
it lives.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

from pgtemp.errors import ClusterError, PgTempError

_log = logging.getLogger("pgtemp")
T = TypeVar("T")
Again = Callable[[T], T | None]
_MAKERS = 2  # on two cores more makers make no more
_CALM_SECONDS = 10.0


class Kind(Protocol[T]):
    """What a pool needs to know of the things in it."""

    @property
    def recycles(self) -> bool:
        """Whether what was ended makes the next one cheaper."""

    def provision(self) -> T: ...
    def dispose(self, thing: T) -> None: ...
    def usable(self, thing: T) -> bool: ...


class Pool(Generic[T]):
    """Keeps `ready` things ready, up to `most` while many are asked for."""

    def __init__(
        self, kind: Kind[T], *, ready: int, most: int | None = None, pause: float = 0.015
    ) -> None:
        """Nothing is made before the first is asked for.

        Args:
            pause: seconds that whoever has just been served has for himself, since there are not
                that many cores, before the next is made; and twice that before one is ended.
        """
        self._kind = kind
        self._pause = pause
        self._target = self._least = ready
        self._most = max(ready, most if most is not None else ready)
        self._calming: threading.Timer | None = None
        self._busy = False  # whether anybody has asked since the last look
        self._ready: deque[T] = deque()
        self._waiting: deque[Future[T]] = deque()
        self._making = 0
        self._retired: deque[tuple[T, Again[T] | None]] = deque()  # that are still to be ended
        self._closed = False
        self._owner = os.getpid()  # a forked child has neither the threads nor the right
        self._lock = threading.Lock()
        self._urgent = threading.Condition(self._lock)
        self._makers = ThreadPoolExecutor(_MAKERS, "pgtemp-make")
        self._enders = ThreadPoolExecutor(1, "pgtemp-end")

    def claim(self) -> Future[T]:
        """One thing, at once where one is ready; the error of the one that could not be made."""
        claimed: Future[T] = Future()
        if self._owner != os.getpid():  # before the lock, which somebody may have held at the fork
            claimed.set_exception(_closed())
            return claimed
        with self._lock:
            if self._closed:
                claimed.set_exception(_closed())
                return claimed
            while self._ready:
                thing = self._ready.popleft()
                if self._kind.usable(thing):
                    claimed.set_result(thing)
                    break
                self._enders.submit(self._end, thing)
            else:
                self._waiting.append(claimed)
                if self._making >= self._target:
                    self._grow()
            self._busy = True
            self._make_enough()
            if not self._ready:
                self._urgent.notify_all()
        return claimed

    def renew(self) -> None:
        """Begin to make what there should be, anew what is no longer usable."""
        with self._lock:
            dead = [thing for thing in self._ready if not self._kind.usable(thing)]
            for thing in dead:
                self._ready.remove(thing)
                self._enders.submit(self._end, thing)
            self._make_enough()

    def _grow(self) -> None:
        # With the lock held.
        self._target = min(self._most, max(1, 2 * self._target))
        if self._calming is None and self._target > self._least:
            self._look_again()

    def _look_again(self) -> None:
        self._calming = threading.Timer(_CALM_SECONDS, self._calm_down)
        self._calming.daemon = True
        self._calming.start()

    def _calm_down(self) -> None:
        """Nobody having asked for a while, keep half as many ready."""
        with self._lock:
            self._calming = None
            if self._closed:
                return
            if not self._busy:
                self._target = max(self._least, self._target // 2)
                while len(self._ready) > self._target:
                    self._enders.submit(self._end, self._ready.pop())
            self._busy = False
            if self._target > self._least:
                self._look_again()

    def take(self) -> T:
        """One thing, waited for; interrupted, what comes too late goes back."""
        claimed = self.claim()
        try:
            return claimed.result()
        except BaseException:
            if not claimed.cancel():
                claimed.add_done_callback(self._too_late)
            raise

    def _too_late(self, claimed: Future[T]) -> None:
        if not claimed.cancelled() and claimed.exception() is None:
            self.give_back(claimed.result())

    def give_back(self, thing: T) -> None:
        """A thing that was not used after all."""
        if not self._kind.usable(thing) or not self._hand_out(thing):
            self.retire(thing)

    def retire(self, thing: T, again: Again[T] | None = None) -> None:
        """Dispose of a thing: in the background, or at once where the pool is closed.

        Nothing happens in a forked child.

        Args:
            again: gives the thing to hand out again, where it is as good as new.
        """
        if self._owner != os.getpid():
            return
        with self._lock:
            if not self._closed:
                self._retired.append((thing, again))
                self._enders.submit(self._end_next)
                self._urgent.notify_all()
                return
        self._end(thing)

    def refuse(self) -> None:
        """Hand out nothing more; who waits is told."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
            self._urgent.notify_all()
            if self._calming is not None:
                self._calming.cancel()
        for claimed in waiting:
            if claimed.set_running_or_notify_cancel():
                claimed.set_exception(_closed())

    def close(self, *, dispose: bool = True) -> None:
        """Dispose of everything that is not handed out, and wait for what is under way.

        Args:
            dispose: False where all of it goes by itself, as databases do with their server.
        """
        self.refuse()
        with self._lock:
            ready, self._ready = self._ready, deque()
        for thing in ready if dispose else ():
            self._enders.submit(self._end, thing)
        self._makers.shutdown(wait=True, cancel_futures=True)
        self._enders.shutdown(wait=True, cancel_futures=not dispose)

    def _end_next(self) -> None:
        with self._urgent:
            self._urgent.wait_for(lambda: len(self._retired) != 1 or self._closed, 2 * self._pause)
            retired = self._retired.popleft() if self._retired else None
        if retired is not None:
            self._retire(*retired)

    def _retire(self, thing: T, again: Again[T] | None) -> None:
        try:
            if again is not None and not self._closed and (as_new := again(thing)) is not None:
                if self._hand_out(as_new):
                    return
                thing = as_new
        except PgTempError as error:
            _log.info("not handed out again: %s", error)
        self._end(thing)

    def _end(self, thing: T) -> None:
        try:
            self._kind.dispose(thing)
        except PgTempError as error:
            if not self._closed:  # else it went with its server
                _log.warning("could not be disposed of: %s", error)
        except Exception:
            _log.exception("could not be disposed of")

    def _make_enough(self) -> None:
        # With the lock held.
        while not self._closed and self._making + len(self._ready) < self._target + len(
            self._waiting
        ):
            self._making += 1
            self._makers.submit(self._make)

    def _make(self) -> None:
        with self._urgent:
            self._urgent.wait_for(self._in_a_hurry, self._pause)
            recycling = self._kind.recycles and bool(self._retired)
            retired = self._retired.popleft() if recycling else None
        if retired is not None:
            self._retire(*retired)
        try:
            thing = self._kind.provision()
        except BaseException as error:
            self._fail(error)
            return
        with self._lock:
            self._making -= 1
        if not self._hand_out(thing):
            self._end(thing)

    def _in_a_hurry(self) -> bool:
        return not self._ready or bool(self._waiting) or self._closed

    def _hand_out(self, thing: T) -> bool:
        """Give it to who waits longest, else keep it ready; False where there is no room."""
        with self._lock:
            claimed = self._next_waiting()
            # One too many is not worth its end: the next claim makes one less.
            if claimed is None:
                if self._closed or len(self._ready) > self._target:
                    return False
                self._ready.append(thing)
                return True
        claimed.set_result(thing)  # without the lock: what is told may come back at once
        return True

    def _fail(self, error: BaseException) -> None:
        """Tell who waits longest; nobody waiting, the next claim tries again."""
        with self._lock:
            self._making -= 1
            claimed = self._next_waiting()
        if claimed is not None:
            claimed.set_exception(error)

    def _next_waiting(self) -> Future[T] | None:
        # With the lock held.
        while self._waiting:
            claimed = self._waiting.popleft()
            if claimed.set_running_or_notify_cancel():
                return claimed
        return None


class PoolClosedError(ClusterError):
    """Nothing more comes from here."""


def _closed() -> PoolClosedError:
    return PoolClosedError(
        "the cluster is not running here",
        remedy="it was stopped, or belongs to the process that this one was forked from",
    )
