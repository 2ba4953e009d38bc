"""Doing something later, on the I/O thread of a device."""

import heapq
from collections.abc import Callable
from itertools import count
from threading import Lock
from time import monotonic

from pyvirtio._core import IoThread, Timer


class Later:
    """Calls to be made on the I/O thread of a device when their time has come. Any thread."""

    def __init__(self, loop: IoThread) -> None:
        self._timer = Timer()
        self._calls: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = count()
        self._lock = Lock()
        self._watch = loop.watch(self._timer.fd, self._expired)

    def call(self, delay: float, callback: Callable[[], object]) -> None:
        """In `delay` seconds, unless it is closed before."""
        with self._lock:
            heapq.heappush(self._calls, (monotonic() + delay, next(self._numbers), callback))
            self._start()

    def close(self) -> None:
        """Make the calls that are left, in order, and no others."""
        self._watch.close()
        with self._lock:
            calls, self._calls = sorted(self._calls), []
            self._timer.stop()
        for _, _, callback in calls:
            callback()

    def _start(self) -> None:
        if self._calls:
            self._timer.start(max(0.0, self._calls[0][0] - monotonic()))

    def _expired(self) -> None:
        self._timer.take()
        due = []
        with self._lock:
            while self._calls and self._calls[0][0] <= monotonic():
                due.append(heapq.heappop(self._calls)[2])
            self._start()
        for callback in due:
            callback()
