"""What a driver and a device may do with a ring (virtio 1.3, 2.7)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from pyvirtio._core import GuestMemory
from pyvirtio.lint.chains import Chain, walk
from pyvirtio.lint.report import Report, Violation, Who

NO_NOTIFY = 1


@dataclass(frozen=True)
class Ring:
    """Where a split ring lies and what was agreed for it."""

    memory: GuestMemory
    size: int
    desc: int
    avail: int
    used: int
    event_idx: bool
    indirect: bool
    next_avail: int
    next_used: int

    def avail_word(self, number: int) -> int:
        """flags, idx, the entries, used_event."""
        return self.memory.load16(self.avail + 2 * number)

    def used_word(self, number: int) -> int:
        """flags, idx; behind the entries avail_event."""
        return self.memory.load16(self.used + 2 * number)

    def used_element(self, index: int) -> tuple[int, int]:
        data = self.memory.read(self.used + 4 + 8 * (index % self.size), 8)
        return int.from_bytes(data[:4], "little"), int.from_bytes(data[4:], "little")

    @property
    def avail_event(self) -> int:
        return self.used_word(2 + 4 * self.size)


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
    """Follows one ring: which chains are in flight, and which descriptors they have."""

    def __init__(self, rings: Rings, name: str) -> None:
        self.rings, self.name = rings, name
        self.ring: Ring | None = None
        self._given: dict[str, Any] | None = None
        self._lock = threading.Lock()

    def _start(self, given: dict[str, Any]) -> None:
        self.ring = ring = Ring(**{name: given[name] for name in Ring.__dataclass_fields__})
        self.next_avail, self.next_used = ring.next_avail, ring.next_used
        self.notified_at = ring.next_avail
        self.served_by: set[int] = set()
        """Threads; what the driver saw before its decision is only known if it serves the ring itself."""
        self.in_flight: dict[int, Chain] = {}
        self.owners: dict[int, int] = {}
        """Descriptor -> the head of the chain in flight that it belongs to."""

    def look(self, given: dict[str, Any] | None) -> None:
        """Follow what has happened since the last look; `given` is the ring of `VirtQueue.watch`."""
        with self._lock:
            if given is not self._given:
                self._given, self.ring = given, None
                if given is not None and not given.get("packed"):
                    self._start(given)
            if self.ring is not None:
                self.served_by.add(threading.get_ident())
                self._follow(self.ring)

    def look_again(self) -> None:
        with self._lock:
            if self.ring is not None:
                self._follow(self.ring)

    def _follow(self, ring: Ring) -> None:
        # The avail index first: a head that was used and is available again has its used entry below the other.
        avail, used = ring.avail_word(1), ring.used_word(1)
        self._check_flags(ring)
        if self._served_by_others(avail, used):
            self.ring = None  # until the next start: what is in flight is not known any more
            return
        self._follow_used(ring, used)
        self._follow_avail(ring, avail)
        if (self.next_avail - self.notified_at) & 0xFFFF > 0x8000:  # kicks that are eventfds are not seen
            self.notified_at = (self.next_avail - 0x8000) & 0xFFFF

    def _served_by_others(self, avail: int, used: int) -> bool:
        """Whether buffers were used that we have not even seen to be available: vhost in the kernel has the ring."""
        unseen = ((used - self.next_used) & 0xFFFF) - len(self.in_flight)
        return 0 < unseen <= (avail - self.next_avail) & 0xFFFF

    def _check_flags(self, ring: Ring) -> None:
        most, agreed = (0, "with") if ring.event_idx else (1, "without")
        if (flags := ring.avail_word(0)) > most:
            self._violation("driver", "2.7.7.1", f"flags of the avail ring are {flags:#x} {agreed} EVENT_IDX")
        if (flags := ring.used_word(0)) > most:
            self._violation("device", "2.7.10.2", f"flags of the used ring are {flags:#x} {agreed} EVENT_IDX")

    # The device's side

    def _follow_used(self, ring: Ring, used: int) -> None:
        count = (used - self.next_used) & 0xFFFF
        if count > ring.size:
            text = f"the used index went from {self.next_used} to {used}, the ring has {ring.size} entries"
            self._violation("device", "2.7.8", text)
            self.next_used = used
            return
        for _ in range(count):
            self._used(*ring.used_element(self.next_used))
            self.next_used = (self.next_used + 1) & 0xFFFF
        if count and self.rings.live is False:
            self._violation("device", "2.1.2", "buffers were used before DRIVER_OK")

    def _used(self, head: int, length: int) -> None:
        chain = self.in_flight.pop(head, None)
        if chain is None:
            self._violation("device", "2.7.8", f"a used element of buffer {head}, which is not in flight")
            return
        for index in chain.indexes:
            self.owners.pop(index, None)
        if length > chain.writable:
            text = f"used length {length} of a buffer with {chain.writable} device-writable bytes"
            self._violation("device", "2.7.8.2", text)

    # The driver's side

    def _follow_avail(self, ring: Ring, avail: int) -> None:
        count = (avail - self.next_avail) & 0xFFFF
        if count > ring.size:
            section, how = ("2.7.6.1", "back") if count >= 0x8000 else ("2.7.13.3", "ahead")
            self._violation("driver", section, f"the avail index went {how} from {self.next_avail} to {avail}")
            self.next_avail = avail
            return
        for _ in range(count):
            self._available(ring, ring.avail_word(2 + self.next_avail % ring.size))
            self.next_avail = (self.next_avail + 1) & 0xFFFF

    def _available(self, ring: Ring, head: int) -> None:
        chain = walk(ring.memory, ring.desc, ring.size, head, indirect=ring.indirect)
        for section, text in chain.faults:
            self._violation("driver", section, text)
        for index in chain.indexes:
            if index in self.owners:
                self._violation("driver", "3.3.1", f"descriptor {index} belongs to a buffer in flight")
            self.owners[index] = head
        self.in_flight[head] = chain

    def notified(self) -> None:
        """Called before the notification reaches the device."""
        with self._lock:
            ring = self.ring
            if ring is None or not self.rings.strict or self.served_by - {threading.get_ident()}:
                return
            avail = ring.avail_word(1)
            if ring.event_idx:
                event = ring.avail_event
                wanted = (event - self.notified_at) & 0xFFFF < (avail - self.notified_at) & 0xFFFF
            else:
                wanted = not ring.used_word(0) & NO_NOTIFY
            self.notified_at = avail
        if not wanted:
            self._violation("driver", "2.7.10.1", "notified although the device had not asked for it")

    def _violation(self, who: Who, section: str, text: str) -> None:
        self.rings.violation(who, section, f"{self.name}: {text}")
