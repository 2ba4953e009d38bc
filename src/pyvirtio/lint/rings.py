"""The rings of a device under the lint: who looks at them, and when."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakValueDictionary

from pyvirtio.lint.packed import PackedFollower
from pyvirtio.lint.report import Report, Violation, Who
from pyvirtio.lint.split import SplitFollower


class Follower(Protocol):
    """Follows what driver and device do with one ring since its start. Called by one thread at a time."""

    def follow(self) -> bool:
        """Look at what is new; False if it cannot be followed any more."""

    def wanted(self) -> bool:
        """The driver notifies: whether the device had asked for that since the last time."""


class Rings:
    """The rings of one device. `live` is whether DRIVER_OK is set; None where nobody can tell."""

    def __init__(self, name: str, report: Report, *, strict: bool) -> None:
        self.name, self.report, self.strict = name, report, strict
        self.live: bool | None = None
        # Weak: the queue keeps what watches it, and with the queue it goes.
        self.watchers: WeakValueDictionary[int, RingWatcher] = WeakValueDictionary()

    def of(self, index: int, name: str) -> Callable[[dict[str, Any] | None], object]:
        """What is to be called for a queue with the ring that is in use."""
        watcher = self.watchers[index] = RingWatcher(self, name)
        return watcher.look

    def look(self) -> None:
        """Look at all of them once more."""
        for watcher in list(self.watchers.values()):
            watcher.look_again()

    def notified(self, index: int) -> None:
        """The driver notifies a queue, and the notify came to us."""
        if watcher := self.watchers.get(index):
            watcher.notified()

    def violation(self, who: Who, section: str, text: str) -> None:
        self.report.add(Violation(self.name, who, section, text))


class RingWatcher:
    """Has the ring of one queue followed, from its start to its stop."""

    def __init__(self, rings: Rings, name: str) -> None:
        self.rings, self.name = rings, name
        self._follower: Follower | None = None
        self._given: dict[str, Any] | None = None
        self._served_by: set[int] = set()
        """Threads; what the driver saw before its decision is only known if it serves the ring itself."""
        self._lock = threading.Lock()

    def look(self, given: dict[str, Any] | None) -> None:
        """Follow what has happened since the last look; `given` is the ring of `VirtQueue.watch`."""
        with self._lock:
            if given is not self._given:
                self._given, self._follower = given, None
                if given is not None:
                    self._served_by.clear()
                    kind = PackedFollower if given["packed"] else SplitFollower
                    self._follower = kind(given, self.violation, lambda: self.rings.live)
            self._served_by.add(threading.get_ident())
            self._follow()

    def look_again(self) -> None:
        with self._lock:
            self._follow()

    def _follow(self) -> None:
        if self._follower is not None and not self._follower.follow():
            self._follower = None  # until the next start

    def notified(self) -> None:
        """Called before the notification reaches the device."""
        with self._lock:
            if self._follower is None or not self.rings.strict or self._served_by - {threading.get_ident()}:
                return
            wanted = self._follower.wanted()
        if not wanted:
            self.violation("driver", "2.7.10.1", "notified although the device had not asked for it")

    def violation(self, who: Who, section: str, text: str) -> None:
        self.rings.violation(who, section, f"{self.name}: {text}")
