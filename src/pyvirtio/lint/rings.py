"""The rings of a device under the lint: who looks at them, and when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import ReferenceType, WeakValueDictionary

from pyvirtio._core import VirtQueue
from pyvirtio.faults.engine import Running
from pyvirtio.lint.packed import PackedFollower
from pyvirtio.lint.report import Report, Violation, Who
from pyvirtio.lint.split import SplitFollower

PATIENCE = 2.0
"""Seconds that a device has to look at what it was not told of, which it may have noticed by itself."""


class Follower(Protocol):
    """Follows what driver and device do with one ring since its start. Called by one thread at a time."""

    kicks: str
    interrupts: str

    @property
    def position(self) -> tuple[int, int]:
        """How far driver and device were at the last look."""

    def follow(self) -> bool:
        """Look at what is new; False if it cannot be followed any more."""

    def wanted(self) -> bool:
        """The driver notifies: whether the device had asked for that since the last time."""

    def most_kicks(self, asked: Callable[[], int]) -> int | None:
        """How many kicks the device can have asked for since the start, with `VirtQueue.asked`; None if any number."""

    def owes_kick(self, looked: tuple[int, int]) -> bool:
        """Whether the device asks to be told of what was made available since it `looked`."""

    def owes_interrupt(self, before: tuple[int, int]) -> bool | None:
        """Whether the driver asks to be told of what was used since then; None if nobody can tell."""


class Rings:
    """The rings of one device. `live` is whether DRIVER_OK is set; None where nobody can tell.

    `strict`: one CPU drives the device. `counts_kicks`: all of them are the driver's, and each is counted.
    """

    def __init__(self, name: str, report: Report, *, strict: bool, counts_kicks: bool) -> None:
        self.name, self.report, self.strict, self.counts_kicks = name, report, strict, counts_kicks
        self.live: bool | None = None
        # Weak: the queue keeps what watches it, and with the queue it goes.
        self.watchers: WeakValueDictionary[int, RingWatcher] = WeakValueDictionary()

    def of(self, vq: VirtQueue, running: ReferenceType[Running]) -> Callable[[dict[str, Any] | None], object]:
        """What is to be called for a queue with the ring that is in use."""
        watcher = self.watchers[vq.index] = RingWatcher(self, vq, running)
        return watcher.look

    def look(self) -> None:
        """Look at all of them once more, while their driver rests."""
        for watcher in list(self.watchers.values()):
            watcher.look_again()
            watcher.wait_for_kick()

    def notified(self, index: int) -> None:
        """The driver notifies a queue, and the notify came to us."""
        if watcher := self.watchers.get(index):
            watcher.notified()

    def served(self, index: int) -> None:
        """What was to be done for the notify on this thread is done, and the CPU that notified goes on."""
        if watcher := self.watchers.get(index):
            watcher.served()

    def violation(self, who: Who, section: str, text: str) -> None:
        self.report.add(Violation(self.name, who, section, text))


@dataclass
class Call:
    """A notify that is served by the thread that it came on: the driver changes nothing meanwhile."""

    thread: int
    interrupts: int
    """Those sent before."""
    owed: int = 0
    allowed: int = 0


class RingWatcher:
    """Has the ring of one queue followed, from its start to its stop."""

    def __init__(self, rings: Rings, vq: VirtQueue, running: ReferenceType[Running]) -> None:
        self.rings, self.name, self.index, self._running = rings, vq.name, vq.index, running
        self._follower: Follower | None = None
        self._given: dict[str, Any] | None = None
        self._kicked = self._kicked_before = vq.kicked
        """Kicks of the driver that had come at the device's last look, and before the start."""
        self._looked = (0, 0)
        """How far the driver was at the device's last look, and the device."""
        self._call: Call | None = None
        self._served_by: set[int] = set()
        """Threads; what the driver saw before its decision is only known if it serves the ring itself."""
        self._lock = threading.Lock()

    def look(self, given: dict[str, Any] | None) -> None:
        """Follow what has happened since the last look; `given` is the ring of `VirtQueue.watch`."""
        if (running := self._running()) is None:
            return
        vq = running.queues[self.index]
        with self._lock:
            self._kicked = vq.kicked  # before the ring: what they were sent for is there
            if given is not self._given:
                self._start(given)
            self._served_by.add(threading.get_ident())
            self._follow()
            if self._follower is not None:
                self._check_kicks(self._follower, vq)
                self._expect_interrupt(self._follower)
                self._looked = self._follower.position

    def look_again(self) -> None:
        with self._lock:
            self._follow()

    def _start(self, given: dict[str, Any] | None) -> None:
        self._given, self._follower = given, None
        if given is None:
            self._kicked_before = self._kicked
            return
        self._served_by.clear()
        kind = PackedFollower if given["packed"] else SplitFollower
        self._follower = kind(given, self.violation, lambda: self.rings.live)
        self._looked = self._follower.position

    def _follow(self) -> None:
        if self._follower is not None and not self._follower.follow():
            self._follower = self._call = None  # until the next start

    # Kicks

    def notified(self) -> None:
        """Called before the notification reaches the device."""
        with self._lock:
            follower, running = self._follower, self._running()
            if follower is None or running is None or not self._alone():
                return
            self._call = Call(threading.get_ident(), running.queues[self.index].counters["interrupts"])
            if not follower.wanted():
                self._unwanted(follower)

    def _alone(self) -> bool:
        """Whether this thread serves the ring and drives it."""
        return self.rings.strict and not self._served_by - {threading.get_ident()}

    def _check_kicks(self, follower: Follower, vq: VirtQueue) -> None:
        most = follower.most_kicks(lambda: vq.asked) if self.rings.counts_kicks else None
        if most is not None and self._kicked - self._kicked_before > most:
            self._unwanted(follower)
            self._kicked_before = self._kicked - most

    def _unwanted(self, follower: Follower) -> None:
        self.violation("driver", follower.kicks, "notified although the device had not asked for it")

    def wait_for_kick(self) -> None:
        """Report what the resting driver has not told the device of, unless that finds it nevertheless."""
        deadline = time.monotonic() + PATIENCE
        while follower := self._owes_kick():
            if time.monotonic() > deadline:
                text = "made buffers available without a notification, although the device had asked for one"
                self.violation("driver", follower.kicks, text)
                self._looked = follower.position  # to be told once
            time.sleep(0.001)

    def _owes_kick(self) -> Follower | None:
        with self._lock:
            running, follower = self._running(), self._follower
            if running is None or follower is None or not self._is_up(running):
                return None
            told = running.queues[self.index].kicked != self._kicked
            return None if told or not follower.owes_kick(self._looked) else follower

    def _is_up(self, running: Running) -> bool:
        """Whether the device serves; a back-end of vhost-user does as long as it has the ring."""
        up = running.state.driver_ok or not self.rings.counts_kicks
        return up and not running.state.broken

    # Interrupts

    def _expect_interrupt(self, follower: Follower) -> None:
        """Something may have been used: each step is published, looked at, and then decided about."""
        if self._call is None or follower.position[1] == self._looked[1]:
            return
        if self._call.thread != threading.get_ident():
            self._call = None
            return
        owed = follower.owes_interrupt(self._looked)
        self._call.owed += owed is True
        self._call.allowed += owed is not False

    def served(self) -> None:
        """The notify was served on this thread, if it was: all interrupts have been sent."""
        with self._lock:
            call, follower, running = self._call, self._follower, self._running()
            self._call = None
            if call is None or follower is None or running is None or not self._alone():
                return
            sent = running.queues[self.index].counters["interrupts"] - call.interrupts
        if sent > call.allowed:
            self.violation("device", follower.interrupts, "interrupted although the driver had not asked for it")
        if sent < call.owed:
            self.violation("device", follower.interrupts, "did not interrupt although the driver had asked for it")

    def violation(self, who: Who, section: str, text: str) -> None:
        self.rings.violation(who, section, f"{self.name}: {text}")
