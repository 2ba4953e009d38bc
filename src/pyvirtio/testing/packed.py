"""The driver's side of a packed virtqueue (virtio 1.3, 2.8), with every field within reach of a test.

As with the split ring, what the driver expects is kept apart from what stands in memory. A descriptor becomes visible
with its flags, which are stored last.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap

from pyvirtio._core import GuestMemory
from pyvirtio.spec import WRAP_COUNTER
from pyvirtio.testing.heap import Heap
from pyvirtio.testing.ring import NEXT, Desc, Entry, Word

AVAIL, USED = 1 << 7, 1 << 15
ENABLE, DISABLE, AT_DESC = 0, 1, 2
"""Flags of an event suppression structure."""
DESC = struct.Struct("<QIHH")
"""Address, length, buffer id, flags."""
DESC_SIZE = 16
FLAGS_AT = 14
EVENTS = 64
"""Bytes between the event suppression structures, which are not to share a cache line."""


@dataclass(frozen=True)
class Place:
    """An index with its wrap counter."""

    index: int = 0
    wrap: bool = True

    def after(self, n: int, size: int) -> Place:
        laps, index = divmod(self.index + n, size)
        return Place(index, self.wrap ^ bool(laps % 2))

    @property
    def available(self) -> int:
        """The flags that make a descriptor available here."""
        return AVAIL if self.wrap else USED

    @property
    def used(self) -> int:
        return AVAIL | USED if self.wrap else 0

    def __int__(self) -> int:
        """As an event suppression structure and vhost have it: the wrap counter is bit 15."""
        return self.index | (WRAP_COUNTER if self.wrap else 0)


class PackedRing:
    """A descriptor ring and the two event suppression structures at the given guest addresses."""

    driver_event = Word("avail", 0)
    driver_flags = Word("avail", 2)
    device_event = Word("used", 0)
    device_flags = Word("used", 2)

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        event_idx: bool = False,
        in_order: bool = False,
    ) -> None:
        self.memory, self.size, self.event_idx, self.in_order = memory, size, event_idx, in_order
        self.desc, self.avail, self.used = desc, avail, used
        self.next_avail = self.next_used = self._published = Place()
        self.withheld: list[tuple[int, int]] = []
        """Index and flags of the first descriptors that the device is not to see yet."""
        self._free = deque(range(size))
        self._room = size
        self._chains: dict[int, int] = {}
        """Descriptors of each chain that the device has, by buffer id, in the order of their making."""
        self._found: deque[tuple[int, int | None]] = deque()

    @classmethod
    def allocate(
        cls, memory: GuestMemory, heap: Heap, size: int, *, event_idx: bool = False, in_order: bool = False
    ) -> PackedRing:
        """A zeroed ring."""
        avail = -(-DESC_SIZE * size // EVENTS) * EVENTS
        desc = heap.allocate(max(4096, avail + 2 * EVENTS))
        memory.write(desc, bytes(avail + 2 * EVENTS))
        return cls(memory, size, desc, desc + avail, desc + avail + EVENTS, event_idx=event_idx, in_order=in_order)

    @property
    def span(self) -> int:
        return max(4096, self.used + EVENTS - self.desc)

    def state(self) -> dict[str, int]:
        """The words that both sides share, and where the driver stands; bit 15 is a wrap counter."""
        names = ("driver_event", "driver_flags", "device_event", "device_flags")
        words = {name: getattr(self, name) for name in names}
        return {"size": self.size, **words, "next_avail": int(self.next_avail), "next_used": int(self.next_used)}

    @property
    def device_ranges(self) -> list[tuple[int, int]]:
        """Address and length of the ring memory that the device may write."""
        return [(self.desc, DESC_SIZE * self.size), (self.used, 4)]

    @property
    def driver_ranges(self) -> list[tuple[int, int]]:
        """What `publish` and `expect_interrupt` write."""
        return [(self.desc, DESC_SIZE * self.size), (self.avail, 4)]

    @property
    def base(self) -> int:
        """Where a device goes on that has completed everything, as vhost-user says it."""
        return int(self.next_used) << 16 | int(self.next_used)

    def write_desc(self, index: int, desc: Desc) -> None:
        """The descriptor as it is given, `next` being the buffer id; its flags last."""
        address = self.desc + DESC_SIZE * index
        self.memory.write(address, DESC.pack(desc.address, desc.length, desc.next, 0)[:FLAGS_AT])
        self.write_flags(index, desc.flags)

    @staticmethod
    def table(descs: Sequence[Entry]) -> bytes:
        """An indirect table, with the descriptors as they are given."""
        return b"".join([DESC.pack(address, length, id_, flags) for address, length, flags, id_ in descs])

    @staticmethod
    def linked(descs: Sequence[Entry]) -> list[Desc]:
        """The descriptors of a chain as they are to stand in an indirect table: one after the other is enough."""
        return list(starmap(Desc, descs))

    def write_flags(self, index: int, flags: int) -> None:
        self.memory.store16(self.desc + DESC_SIZE * index + FLAGS_AT, flags & 0xFFFF)

    def read_flags(self, index: int) -> int:
        return self.memory.load16(self.desc + DESC_SIZE * index + FLAGS_AT)

    def read_desc(self, index: int) -> Desc:
        flags = self.read_flags(index)
        address, length, id_, _ = DESC.unpack(self.memory.read(self.desc + DESC_SIZE * index, DESC_SIZE))
        return Desc(address, length, flags, id_)

    def add(self, descs: Sequence[Entry]) -> int:
        """Write a chain, not yet published; return its buffer id."""
        if len(descs) > self._room:
            raise BufferError(f"{len(descs)} descriptors wanted, {self._room} free")
        id_ = self._free.popleft()
        self.offer(descs, id_)
        return id_

    def offer(self, descs: Sequence[Entry], id_: int) -> None:
        """The next descriptors with this id, linked, whatever they are; not yet published."""
        index, available, last = self.next_avail.index, self.next_avail.available, len(descs) - 1
        for n, (address, length, flags, _) in enumerate(descs):
            flags |= available | (NEXT if n < last else 0)
            if n == 0:
                self.withheld.append((index, flags))
            self.memory.write(self.desc + DESC_SIZE * index, DESC.pack(address, length, id_, flags if n else 0))
            index += 1
            if index == self.size:
                index, available = 0, available ^ (AVAIL | USED)
        self.next_avail = self.next_avail.after(len(descs), self.size)
        self._room -= len(descs)
        self._chains[id_] = len(descs)

    def publish(self) -> bool:
        """Show the device what was added, the first chain last; return whether it asked for a notification."""
        while self.withheld:
            self.write_flags(*self.withheld.pop())
        old, self._published = self._published, self.next_avail
        if not self.event_idx or self.device_flags != AT_DESC:
            return self.device_flags != DISABLE
        return self._distance(old, self._place(self.device_event)) < self._distance(old, self.next_avail)

    @staticmethod
    def _place(word: int) -> Place:
        return Place(word & ~WRAP_COUNTER, bool(word & WRAP_COUNTER))

    def _distance(self, start: Place, end: Place) -> int:
        lap = 0 if start.wrap == end.wrap else self.size
        return (end.index - start.index + lap) % (2 * self.size)

    @property
    def has_used(self) -> bool:
        """Whether the device gave something back that was not taken yet."""
        return bool(self._found) or self._next_is_used()

    def take_used(self) -> list[tuple[int, int | None]]:
        """(buffer id, length) of all that the device gave back; None for the length of all that is writable."""
        while self._next_is_used():
            self._take_next()
        found = list(self._found)
        self._found.clear()
        return found

    def pop_used(self) -> tuple[int, int | None] | None:
        """The next that the device gave back."""
        if not self._found and self._next_is_used():
            self._take_next()
        return self._found.popleft() if self._found else None

    def _next_is_used(self) -> bool:
        return self.read_flags(self.next_used.index) & (AVAIL | USED) == self.next_used.used

    def _take_next(self) -> None:
        """One used descriptor; with IN_ORDER it stands for the chains before its own too, which were used whole."""
        used = self.read_desc(self.next_used.index)
        if self.in_order and used.next in self._chains:
            for id_ in list(self._chains):
                if id_ == used.next:
                    break
                self._take_back(id_, None)
        self._take_back(used.next, used.length)

    def _take_back(self, id_: int, length: int | None) -> None:
        descs = self._chains.pop(id_, None)
        if descs is not None:
            self._free.append(id_)
            self._room += descs
        self.next_used = self.next_used.after(descs or 1, self.size)
        self._found.append((id_, length))

    def expect_interrupt(self) -> None:
        """Ask for an interrupt for the next used buffer; the ring must be looked at again after this."""
        if self.event_idx:
            self.driver_event = int(self.next_used)
            self.driver_flags = AT_DESC
