"""A pool keeps a few items ready in advance.

The pool's own threads create items in advance and dispose of them in the background. Items are
handed out in the order of the claims. If claims arrive faster than items are created, the pool
keeps more items ready; after a period without claims, it keeps fewer. The pool only creates items,
disposes of them, and asks whether they are usable; it does not depend on their kind.
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
_MAKERS = 2  # on two cores, more threads do not create items faster
_SHRINK_SECONDS = 10.0


class Kind(Protocol[T]):
    """The operations of a pool on its items."""

    @property
    def recycles(self) -> bool:
        """Whether disposing of an item makes the next one cheaper."""

    def provision(self) -> T: ...
    def dispose(self, item: T) -> None: ...
    def usable(self, item: T) -> bool: ...


class Pool(Generic[T]):
    """Keeps `ready` items ready, and up to `most` while there are many claims."""

    def __init__(
        self, kind: Kind[T], *, ready: int, most: int | None = None, pause: float = 0.015
    ) -> None:
        """Create an empty pool; the first claim starts to fill it.

        Args:
            pause: seconds by which the pool delays creating the next item after a claim, so that it
                does not compete for the cores with the client just served. It delays disposing of
                an item by twice that time.
        """
        self._kind = kind
        self._pause = pause
        self._target = self._least = ready
        self._most = max(ready, most if most is not None else ready)
        self._shrink_timer: threading.Timer | None = None
        self._busy = False  # whether there was a claim since the last check
        self._ready: deque[T] = deque()
        self._waiting: deque[Future[T]] = deque()
        self._making = 0
        self._retired: deque[tuple[T, Again[T] | None]] = deque()  # still to be disposed of
        self._closed = False
        self._owner = os.getpid()  # a forked child has no threads and does not own the items
        self._lock = threading.Lock()
        self._urgent = threading.Condition(self._lock)
        self._makers = ThreadPoolExecutor(_MAKERS, "pgtemp-make")
        self._disposers = ThreadPoolExecutor(1, "pgtemp-dispose")

    def claim(self) -> Future[T]:
        """Return a future of an item; it is done if one is ready.

        If the item could not be created, it has the error.
        """
        claimed: Future[T] = Future()
        # Check before taking the lock: another thread may have held it at the time of the fork.
        if self._owner != os.getpid():
            claimed.set_exception(_closed())
            return claimed
        with self._lock:
            if self._closed:
                claimed.set_exception(_closed())
                return claimed
            while self._ready:
                item = self._ready.popleft()
                if self._kind.usable(item):
                    claimed.set_result(item)
                    break
                self._disposers.submit(self._dispose, item)
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
        """Replace the items that are no longer usable, and start to create missing ones."""
        with self._lock:
            dead = [item for item in self._ready if not self._kind.usable(item)]
            for item in dead:
                self._ready.remove(item)
                self._disposers.submit(self._dispose, item)
            self._make_enough()

    def _grow(self) -> None:
        # The lock must be held.
        self._target = min(self._most, max(1, 2 * self._target))
        if self._shrink_timer is None and self._target > self._least:
            self._schedule_shrink()

    def _schedule_shrink(self) -> None:
        self._shrink_timer = threading.Timer(_SHRINK_SECONDS, self._shrink)
        self._shrink_timer.daemon = True
        self._shrink_timer.start()

    def _shrink(self) -> None:
        """If there was no claim since the last check, halve the number of ready items."""
        with self._lock:
            self._shrink_timer = None
            if self._closed:
                return
            if not self._busy:
                self._target = max(self._least, self._target // 2)
                while len(self._ready) > self._target:
                    self._disposers.submit(self._dispose, self._ready.pop())
            self._busy = False
            if self._target > self._least:
                self._schedule_shrink()

    def take(self) -> T:
        """Wait for an item; if interrupted, give the item back to the pool when it arrives."""
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

    def give_back(self, item: T) -> None:
        """Take back an item that was not used."""
        if not self._kind.usable(item) or not self._hand_out(item):
            self.retire(item)

    def retire(self, item: T, again: Again[T] | None = None) -> None:
        """Dispose of an item: in the background, or immediately if the pool is closed.

        Nothing happens in a forked child.

        Args:
            again: a function that returns an item to hand out again if the given one can be reused,
                else None.
        """
        if self._owner != os.getpid():
            return
        with self._lock:
            if not self._closed:
                self._retired.append((item, again))
                self._disposers.submit(self._dispose_next)
                self._urgent.notify_all()
                return
        self._dispose(item)

    def refuse(self) -> None:
        """Hand out no more items; pending claims fail with PoolClosedError."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
            self._urgent.notify_all()
            if self._shrink_timer is not None:
                self._shrink_timer.cancel()
        for claimed in waiting:
            if claimed.set_running_or_notify_cancel():
                claimed.set_exception(_closed())

    def close(self, *, dispose: bool = True) -> None:
        """Dispose of all items that are not handed out, and wait for running operations.

        Args:
            dispose: False if the items need not be disposed of, such as databases whose server is
                stopped.
        """
        self.refuse()
        with self._lock:
            ready, self._ready = self._ready, deque()
        for item in ready if dispose else ():
            self._disposers.submit(self._dispose, item)
        self._makers.shutdown(wait=True, cancel_futures=True)
        self._disposers.shutdown(wait=True, cancel_futures=not dispose)

    def _dispose_next(self) -> None:
        with self._urgent:
            self._urgent.wait_for(lambda: len(self._retired) != 1 or self._closed, 2 * self._pause)
            retired = self._retired.popleft() if self._retired else None
        if retired is not None:
            self._retire(*retired)

    def _retire(self, item: T, again: Again[T] | None) -> None:
        try:
            if again is not None and not self._closed and (as_new := again(item)) is not None:
                if self._hand_out(as_new):
                    return
                item = as_new
        except PgTempError as error:
            _log.info("an item is not handed out again: %s", error)
        self._dispose(item)

    def _dispose(self, item: T) -> None:
        try:
            self._kind.dispose(item)
        except PgTempError as error:
            if not self._closed:  # if the pool is closed, the item was removed with its server
                _log.warning("an item could not be disposed of: %s", error)
        except Exception:
            _log.exception("could not be disposed of")

    def _make_enough(self) -> None:
        # The lock must be held.
        while not self._closed and self._making + len(self._ready) < self._target + len(
            self._waiting
        ):
            self._making += 1
            self._makers.submit(self._make)

    def _make(self) -> None:
        with self._urgent:
            self._urgent.wait_for(self._is_urgent, self._pause)
            recycling = self._kind.recycles and bool(self._retired)
            retired = self._retired.popleft() if recycling else None
        if retired is not None:
            self._retire(*retired)
        try:
            item = self._kind.provision()
        except BaseException as error:
            self._fail(error)
            return
        with self._lock:
            self._making -= 1
        if not self._hand_out(item):
            self._dispose(item)

    def _is_urgent(self) -> bool:
        return not self._ready or bool(self._waiting) or self._closed

    def _hand_out(self, item: T) -> bool:
        """Hand an item to the oldest pending claim, or keep it ready.

        Returns:
            False if there are enough ready items.
        """
        with self._lock:
            claimed = self._next_waiting()
            # Disposing of a single surplus item is not worthwhile: keep it, and create one less
            # after the next claim.
            if claimed is None:
                if self._closed or len(self._ready) > self._target:
                    return False
                self._ready.append(item)
                return True
        claimed.set_result(item)  # without the lock, because a callback may call the pool
        return True

    def _fail(self, error: BaseException) -> None:
        """Make the oldest pending claim fail; if there is none, the next claim tries again."""
        with self._lock:
            self._making -= 1
            claimed = self._next_waiting()
        if claimed is not None:
            claimed.set_exception(error)

    def _next_waiting(self) -> Future[T] | None:
        # The lock must be held.
        while self._waiting:
            claimed = self._waiting.popleft()
            if claimed.set_running_or_notify_cancel():
                return claimed
        return None


class PoolClosedError(ClusterError):
    """The pool hands out no more items."""


def _closed() -> PoolClosedError:
    return PoolClosedError(
        "the cluster is not running in this process",
        remedy="it was stopped, or belongs to the process that this one was forked from",
    )
