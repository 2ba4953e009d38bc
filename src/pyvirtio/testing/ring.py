"""The driver's side of a split virtqueue (virtio 1.3, 2.7), with every field within reach of a test.

The shared words are read and written atomically. What the driver expects (`next_avail`, `next_used`, the free
descriptors) is kept apart from what stands in memory, so a test may write nonsense there and still go on.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import starmap
from typing import NamedTuple, Protocol, overload

from pyvirtio._core import GuestMemory
from pyvirtio.testing.heap import Heap

NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = NO_NOTIFY = 1

Entry = tuple[int, int, int, int]
"""What is in a `Desc`, which takes three times as long to make."""

DESC, USED = struct.Struct("<QIHH"), struct.Struct("<II")


class Desc(NamedTuple):
    """One descriptor; `WRITE` in the flags means that the device writes."""

    address: int
    length: int
    flags: int = 0
    next: int = 0

    def pack(self) -> bytes:
        """As it stands in the table of a split ring."""
        return DESC.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Desc:
        return cls(*DESC.unpack(data))


def linked(descs: Sequence[Entry], indexes: Sequence[int]) -> list[Desc]:
    """The descriptors chained to each other, as they stand at `indexes` of a table."""
    found = [
        Desc(address, length, flags | NEXT, next_)
        for (address, length, flags, _), next_ in zip(descs, indexes[1:], strict=False)
    ]
    return [*found, *starmap(Desc, descs[-1:])]


class Areas(Protocol):
    """Where a ring lies."""

    memory: GuestMemory
    size: int


class Word:
    """A 16-bit field of a ring, behind `after` bytes and one `entry` for each entry of the ring."""

    def __init__(self, part: str, after: int, entry: int = 0) -> None:
        self.part, self.after, self.entry = part, after, entry

    @overload
    def __get__(self, ring: None, owner: object) -> Word: ...
    @overload
    def __get__(self, ring: Areas, owner: object) -> int: ...
    def __get__(self, ring: Areas | None, owner: object) -> int | Word:
        if ring is None:
            return self
        return ring.memory.load16(getattr(ring, self.part) + self.after + self.entry * ring.size)

    def __set__(self, ring: Areas, value: int) -> None:
        ring.memory.store16(getattr(ring, self.part) + self.after + self.entry * ring.size, value & 0xFFFF)


class SplitRing:
    """A descriptor table, an avail ring and a used ring at the given guest addresses."""

    avail_flags = Word("avail", 0)
    avail_idx = Word("avail", 2)
    used_event = Word("avail", 4, 2)
    used_flags = Word("used", 0)
    used_idx = Word("used", 2)
    avail_event = Word("used", 4, 8)

    def __init__(
        self, memory: GuestMemory, size: int, desc: int, avail: int, used: int, *, event_idx: bool = False
    ) -> None:
        self.memory, self.size, self.event_idx = memory, size, event_idx
        self.desc, self.avail, self.used = desc, avail, used
        self.next_avail = 0
        self.next_used = 0
        self._published = 0
        self._free = list(reversed(range(size)))
        self._chains: dict[int, list[int]] = {}

    @classmethod
    def allocate(cls, memory: GuestMemory, heap: Heap, size: int, *, event_idx: bool = False) -> SplitRing:
        """A zeroed ring of the legacy layout, which is a valid modern one too."""
        desc_bytes, avail_bytes, used_bytes = cls.sizes(size)
        used_at = (desc_bytes + avail_bytes + 4095) & ~4095
        desc = heap.allocate(max(4096, used_at + used_bytes))
        memory.write(desc, bytes(used_at + used_bytes))
        return cls(memory, size, desc, desc + desc_bytes, desc + used_at, event_idx=event_idx)

    @staticmethod
    def sizes(size: int) -> tuple[int, int, int]:
        """Bytes of the descriptor table, the avail ring and the used ring."""
        return 16 * size, 6 + 2 * size, 6 + 8 * size

    def state(self) -> dict[str, int]:
        """The words that both sides share, as they are now."""
        names = ("avail_flags", "avail_idx", "used_event", "used_flags", "used_idx", "avail_event")
        return {"size": self.size} | {name: getattr(self, name) for name in names}

    @property
    def span(self) -> int:
        """From the descriptor table's start to the used ring's end, in the legacy layout."""
        return self.used - self.desc + self.sizes(self.size)[2]

    @property
    def used_range(self) -> tuple[int, int]:
        """Address and length of the only ring memory that the device writes."""
        return self.used, self.sizes(self.size)[2]

    @property
    def device_ranges(self) -> list[tuple[int, int]]:
        """Address and length of the ring memory that the device may write."""
        return [self.used_range]

    @property
    def driver_ranges(self) -> list[tuple[int, int]]:
        """What `publish` and `expect_interrupt` write: flags and index, and the used event."""
        return [(self.avail, 4), *([(self.avail + 4 + 2 * self.size, 2)] if self.event_idx else [])]

    @property
    def base(self) -> int:
        """Where a device goes on that has completed everything, as vhost-user says it."""
        return self.used_idx

    def write_desc(self, index: int, desc: Desc) -> None:
        self.memory.write(self.desc + 16 * index, desc.pack())

    @staticmethod
    def table(descs: Sequence[Entry]) -> bytes:
        """An indirect table, with the descriptors as they are given."""
        return b"".join([DESC.pack(*desc) for desc in descs])

    @staticmethod
    def linked(descs: Sequence[Entry]) -> list[Desc]:
        """The descriptors of a chain as they are to stand in an indirect table."""
        return linked(descs, range(len(descs)))

    def write_avail(self, slot: int, head: int) -> None:
        """Entry of the avail ring; `slot` counts on past the size."""
        self.memory.store16(self.avail + 4 + 2 * (slot % self.size), head)

    def used_element(self, slot: int) -> tuple[int, int]:
        """(id, len) in an entry of the used ring; `slot` counts on past the size."""
        id_, length = USED.unpack(self.memory.read(self.used + 4 + 8 * (slot % self.size), 8))
        return id_, length

    def add(self, descs: Sequence[Entry]) -> int:
        """Chain descriptors and put the head into the avail ring, not yet published; return the head."""
        left = len(self._free) - len(descs)
        if left < 0:
            raise BufferError(f"{len(descs)} descriptors wanted, {len(self._free)} free")
        taken = self._free[left:]
        del self._free[left:]
        head = taken[-1]
        next_ = link = 0
        for index, (address, length, flags, _) in zip(taken, reversed(descs), strict=True):
            self.memory.write(self.desc + 16 * index, DESC.pack(address, length, flags | link, next_))
            next_, link = index, NEXT
        self._chains[head] = taken
        self.offer(head)
        return head

    def offer(self, head: int) -> None:
        """The next entry of the avail ring, whatever it is."""
        self.memory.store16(self.avail + 4 + 2 * (self.next_avail % self.size), head)
        self.next_avail = (self.next_avail + 1) & 0xFFFF

    def publish(self) -> bool:
        """Show the device what was added; return whether it asked for a notification (2.7.10)."""
        old, new = self._published, self.next_avail
        self.avail_idx = new
        self._published = new
        if self.event_idx:
            return (new - self.avail_event - 1) & 0xFFFF < (new - old) & 0xFFFF
        return not self.used_flags & NO_NOTIFY

    @property
    def has_used(self) -> bool:
        """Whether the device gave something back that was not taken yet."""
        return self.used_idx != self.next_used

    def take_used(self, most: int = 1 << 16) -> list[tuple[int, int]]:
        """(head, length) of what the device gave back, as far as it stands together."""
        slot = self.next_used % self.size
        count = min(self.used_idx - self.next_used & 0xFFFF, self.size - slot, most)
        found = list(USED.iter_unpack(self.memory.read(self.used + 4 + 8 * slot, 8 * count)))
        self.next_used = self.next_used + count & 0xFFFF
        for head, _ in found:
            self._free += self._chains.pop(head, ())
        return found

    def pop_used(self) -> tuple[int, int] | None:
        """The next (head, length) that the device gave back."""
        found = self.take_used(1)
        return found[0] if found else None

    def expect_interrupt(self) -> None:
        """Ask for an interrupt for the next used buffer; the used ring must be looked at again after this."""
        if self.event_idx:
            self.used_event = self.next_used
