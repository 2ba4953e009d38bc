"""What a driver and a device may do with a packed ring (virtio 1.3, 2.8)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyvirtio._core import GuestMemory
from pyvirtio.lint.chains import NEXT, WRITE, in_ram
from pyvirtio.lint.report import Say
from pyvirtio.spec import WRAP_COUNTER

INDIRECT, AVAIL, USED = 4, 1 << 7, 1 << 15
KNOWN = NEXT | WRITE | INDIRECT | AVAIL | USED
DISABLE, AT_DESC = 1, 2
DESC = struct.Struct("<QIHH")
FLAGS_AT = 14


@dataclass
class Place:
    """An index of the ring with its wrap counter."""

    index: int
    wrap: bool

    @classmethod
    def of(cls, word: int) -> Place:
        return cls(word & ~WRAP_COUNTER, bool(word & WRAP_COUNTER))

    def go_on(self, count: int, size: int) -> None:
        laps, self.index = divmod(self.index + count, size)
        self.wrap ^= bool(laps % 2)


@dataclass
class List:
    """A buffer: how many descriptors of the ring it has, and its device-writable bytes."""

    descs: int
    writable: int


class PackedFollower:
    """Knows which buffers are in flight, by their ids; `say` reports a violation."""

    kicks = interrupts = "2.8.10"
    """The section about when they are to be sent."""

    def __init__(self, given: dict[str, Any], say: Say, live: Callable[[], bool | None]) -> None:
        self.memory: GuestMemory = given["memory"]
        self.size, self.desc, self.used = given["size"], given["desc"], given["used"]
        self.indirect, self.in_order, self.event_idx = given["indirect"], given["in_order"], given["event_idx"]
        self.driver = given["avail"]
        self.say, self.live = say, live
        self.next_avail, self.next_used = Place.of(given["next_avail"]), Place.of(given["next_used"])
        self.start = self.position
        self.in_flight: dict[int, List] = {}

    def follow(self) -> bool:
        while True:
            used = self._follow_used()
            if used is None:
                return False
            if not self._follow_avail() and not used:
                return True

    def wanted(self) -> bool:
        """Without the events' offsets, which the driver's own position is needed for."""
        return self.memory.load16(self.used + 2) != DISABLE

    @property
    def position(self) -> tuple[int, int]:
        """The next available and used places, counted through both laps."""
        return self._lapped(self.next_avail), self._lapped(self.next_used)

    def _lapped(self, place: Place) -> int:
        return place.index + (0 if place.wrap else self.size)

    def most_kicks(self, asked: Callable[[], int]) -> int | None:
        """A driver may notify without anything new (2.8.16)."""
        return None

    def owes_kick(self, looked: tuple[int, int]) -> bool:
        return bool(self._wants(self.used, looked[0], self.position[0]))

    def owes_interrupt(self, before: tuple[int, int]) -> bool | None:
        if before[1] == self.start[1]:
            return None  # the first decision may be to interrupt whatever the driver wants
        return self._wants(self.driver, before[1], self.position[1])

    def _wants(self, area: int, start: int, end: int) -> bool | None:
        """Whether an event suppression structure asks to be told of this step; None for one that makes no sense."""
        flags, event = self.memory.load16(area + 2), Place.of(self.memory.load16(area))
        if flags != AT_DESC:
            return start != end and flags != DISABLE
        if not self.event_idx or event.index >= self.size:
            return None
        both = 2 * self.size
        return bool((self._lapped(event) - start) % both < (end - start) % both)

    def _flags(self, index: int) -> int:
        return self.memory.load16(self.desc + DESC.size * index + FLAGS_AT)

    def _read(self, index: int) -> tuple[int, int, int, int]:
        """address, length, id and flags."""
        address, length, id_, flags = DESC.unpack(self.memory.read(self.desc + DESC.size * index, DESC.size))
        return address, length, id_, flags

    # The device's side

    def _follow_used(self) -> bool | None:
        """Whether there was anything new; None if a used descriptor is gone, because the driver has it again."""
        found = False
        while self.in_flight:
            place = self.next_used
            avail, used = (bool(self._flags(place.index) & bit) for bit in (AVAIL, USED))
            if (avail, used) == (not place.wrap, place.wrap):
                return None
            if (avail, used) != (place.wrap, place.wrap):
                break
            _, length, id_, flags = self._read(place.index)
            self._used(id_, length if flags & WRITE else 0)
            found = True
        if found and self.live() is False:
            self.say("device", "2.1.2", "buffers were used before DRIVER_OK")
        return found

    def _used(self, id_: int, length: int) -> None:
        if self.in_order and id_ in self.in_flight:
            for other in list(self.in_flight)[: list(self.in_flight).index(id_)]:
                self.next_used.go_on(self.in_flight.pop(other).descs, self.size)
        buffer = self.in_flight.pop(id_, None)
        if buffer is None:
            self.say("device", "2.8.22", f"a used descriptor of buffer {id_}, which is not in flight")
        elif length > buffer.writable:
            text = f"used length {length} of a buffer with {buffer.writable} device-writable bytes"
            self.say("device", "2.8.4", text)
        self.next_used.go_on(buffer.descs if buffer else 1, self.size)

    # The driver's side

    def _follow_avail(self) -> bool:
        """Take the next buffer that the driver has made available, if there is one."""
        place = Place(self.next_avail.index, self.next_avail.wrap)
        if sum(buffer.descs for buffer in self.in_flight.values()) >= self.size:
            return False
        total = writable = count = 0
        while True:
            flags = self._flags(place.index)
            if (bool(flags & AVAIL), bool(flags & USED)) != (place.wrap, not place.wrap):
                break
            address, length, id_, flags = self._read(place.index)
            count += 1
            if flags & INDIRECT:
                length, there = self._table(address, length, flags, count)
                total, writable = total + length, writable + there
            else:
                self._check(address, length, flags, writable)
                total, writable = total + length, writable + (length if flags & WRITE else 0)
            place.go_on(1, self.size)
            if not flags & NEXT or count >= self.size:
                return self._available(id_, count, total, writable, whole=not flags & NEXT)
        if count:
            self.say("driver", "2.8.17", "a list whose first descriptor is available before all of it is")
        return False

    def _available(self, id_: int, count: int, total: int, writable: int, *, whole: bool) -> bool:
        if not whole:
            self.say("driver", "2.8.17", f"a list of more than {self.size} descriptors")
        if total >= 1 << 32:
            self.say("driver", "2.8.5", f"a list of {total} bytes")
        if id_ in self.in_flight:
            self.say("driver", "2.8.16", f"buffer id {id_} belongs to a buffer in flight")
        self.in_flight.pop(id_, None)
        self.in_flight[id_] = List(count, writable)
        self.next_avail.go_on(count, self.size)
        return True

    def _check(self, address: int, length: int, flags: int, writable: int) -> None:
        if flags & ~KNOWN:
            self.say("driver", "2.8.13", f"descriptor flags {flags:#x}")
        if writable and not flags & WRITE:
            self.say("driver", "2.8.17", "a device-readable descriptor behind a device-writable one")
        if not in_ram(self.memory, address, length):
            self.say("driver", "2.8.13", f"{length} bytes at {address:#x} are not all RAM")

    def _table(self, address: int, length: int, flags: int, count: int) -> tuple[int, int]:
        """The bytes of an indirect table, and those that are device-writable."""
        if not self.indirect:
            self.say("driver", "2.8.19", "an indirect descriptor without VIRTIO_F_INDIRECT_DESC")
            return 0, 0
        if flags & NEXT or count > 1:
            self.say("driver", "2.8.19", "an indirect descriptor in a list")
        entries = length // DESC.size
        if not entries or length % DESC.size or entries > self.size or not in_ram(self.memory, address, length):
            self.say("driver", "2.8.7", f"an indirect table of {length} bytes at {address:#x}")
            return 0, 0
        total = writable = 0
        for n in range(entries):
            at, size, _, inner = DESC.unpack(self.memory.read(address + DESC.size * n, DESC.size))
            if inner & INDIRECT:
                self.say("driver", "2.8.19", "an indirect descriptor in an indirect table")
                return total, writable
            self._check(at, size, inner, writable)
            total, writable = total + size, writable + (size if inner & WRITE else 0)
        return total, writable
