"""What a driver and a device may do with a split ring (virtio 1.3, 2.7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyvirtio._core import GuestMemory
from pyvirtio.lint.chains import Chain, walk
from pyvirtio.lint.report import Say

NO_NOTIFY = NO_INTERRUPT = 1


@dataclass(frozen=True)
class Ring:
    """Where a split ring lies and what was agreed for it."""

    memory: GuestMemory
    size: int
    desc: int
    avail: int
    used: int
    in_order: bool
    event_idx: bool
    indirect: bool
    notify_on_empty: bool
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

    @property
    def used_event(self) -> int:
        return self.avail_word(2 + self.size)


def within(event: int, start: int, end: int) -> bool:
    """Whether going from one index to another passes the one at which the other side wants to be told."""
    return (event - start) & 0xFFFF < (end - start) & 0xFFFF


class SplitFollower:
    """Knows which chains are in flight, and which descriptors they have; `say` reports a violation."""

    kicks, interrupts = "2.7.10.1", "2.7.7.2"
    """The sections about when they are to be sent."""

    def __init__(self, given: dict[str, Any], say: Say, live: Callable[[], bool | None]) -> None:
        self.ring = ring = Ring(**{name: given[name] for name in Ring.__dataclass_fields__})
        self.say, self.live = say, live
        self.next_avail, self.next_used = ring.next_avail, ring.next_used
        self.notified_at = ring.next_avail
        self.made_available = 0
        self.in_flight: dict[int, Chain] = {}
        self.owners: dict[int, int] = {}
        """Descriptor -> the head of the chain in flight that it belongs to."""

    def follow(self) -> bool:
        # The avail index first: a head that was used and is available again has its used entry below the other.
        avail, used = self.ring.avail_word(1), self.ring.used_word(1)
        self._check_flags()
        if self._served_by_others(avail, used):
            return False
        self._follow_used(used)
        self._follow_avail(avail)
        if (self.next_avail - self.notified_at) & 0xFFFF > 0x8000:  # kicks that are eventfds are not seen
            self.notified_at = (self.next_avail - 0x8000) & 0xFFFF
        return True

    def wanted(self) -> bool:
        avail, since = self.ring.avail_word(1), self.notified_at
        self.notified_at = avail
        if self.ring.event_idx:
            return within(self.ring.avail_event, since, avail)
        return not self.ring.used_word(0) & NO_NOTIFY

    @property
    def position(self) -> tuple[int, int]:
        return self.next_avail, self.next_used

    def most_kicks(self, asked: Callable[[], int]) -> int | None:
        """With EVENT_IDX the driver passes each place where it was asked once, and tells once of what it passes.

        That holds however late a kick comes and whoever sends it. Without, each buffer may be worth one, or none.
        """
        if not self.ring.event_idx:
            return None
        to_come = self.ring.avail_event == self.next_avail  # read before `asked`, which is of that place or a later one
        # A place comes round again, and of before the start there may be a kick on its way.
        more = self.made_available // 0x10000 + (self.ring.next_avail != 0)
        return asked() - to_come + more

    def owes_kick(self, looked: tuple[int, int]) -> bool:
        if self.ring.event_idx:
            return within(self.ring.avail_event, looked[0], self.next_avail)
        return looked[0] != self.next_avail and not self.ring.used_word(0) & NO_NOTIFY

    def owes_interrupt(self, before: tuple[int, int]) -> bool | None:
        if before[1] == self.ring.next_used:
            return None  # the first decision may be to interrupt whatever the driver wants
        if self.ring.event_idx:
            wanted = within(self.ring.used_event, before[1], self.next_used)
        else:
            wanted = not self.ring.avail_word(0) & NO_INTERRUPT
        return wanted or (None if self.ring.notify_on_empty else False)

    def _served_by_others(self, avail: int, used: int) -> bool:
        """Whether buffers were used that we have not even seen to be available: vhost in the kernel has the ring."""
        unseen = ((used - self.next_used) & 0xFFFF) - len(self.in_flight)
        return 0 < unseen <= (avail - self.next_avail) & 0xFFFF

    def _check_flags(self) -> None:
        most, agreed = (0, "with") if self.ring.event_idx else (1, "without")
        if (flags := self.ring.avail_word(0)) > most:
            self.say("driver", "2.7.7.1", f"flags of the avail ring are {flags:#x} {agreed} EVENT_IDX")
        if (flags := self.ring.used_word(0)) > most:
            self.say("device", "2.7.10.2", f"flags of the used ring are {flags:#x} {agreed} EVENT_IDX")

    # The device's side

    def _follow_used(self, used: int) -> None:
        count = (used - self.next_used) & 0xFFFF
        if count > self.ring.size:
            text = f"the used index went from {self.next_used} to {used}, the ring has {self.ring.size} entries"
            self.say("device", "2.7.8", text)
            self.next_used = used
            return
        if count and self.live() is False:
            self.say("device", "2.1.2", "buffers were used before DRIVER_OK")
        while count > 0:
            head, length = self.ring.used_element(self.next_used)
            done = self._used_in_order(head, length) if self.ring.in_order else self._used(head, length)
            self.next_used = (self.next_used + done) & 0xFFFF
            count -= done

    def _used_in_order(self, head: int, length: int) -> int:
        """One element stands for the buffers before it too (2.7.9); how many it is."""
        before = 0
        if head in self.in_flight:
            before = list(self.in_flight).index(head)
            for other in list(self.in_flight)[:before]:
                self._used(other, 0)
        return before + self._used(head, length)

    def _used(self, head: int, length: int) -> int:
        chain = self.in_flight.pop(head, None)
        if chain is None:
            self.say("device", "2.7.8", f"a used element of buffer {head}, which is not in flight")
            return 1
        for index in chain.indexes:
            self.owners.pop(index, None)
        if length > chain.writable:
            text = f"used length {length} of a buffer with {chain.writable} device-writable bytes"
            self.say("device", "2.7.8.2", text)
        return 1

    # The driver's side

    def _follow_avail(self, avail: int) -> None:
        count = (avail - self.next_avail) & 0xFFFF
        if count > self.ring.size:
            section, how = ("2.7.6.1", "back") if count >= 0x8000 else ("2.7.13.3", "ahead")
            self.say("driver", section, f"the avail index went {how} from {self.next_avail} to {avail}")
            self.next_avail = avail
            return
        self.made_available += count
        for _ in range(count):
            self._available(self.ring.avail_word(2 + self.next_avail % self.ring.size))
            self.next_avail = (self.next_avail + 1) & 0xFFFF

    def _available(self, head: int) -> None:
        chain = walk(self.ring.memory, self.ring.desc, self.ring.size, head, indirect=self.ring.indirect)
        for section, text in chain.faults:
            self.say("driver", section, text)
        for index in chain.indexes:
            if index in self.owners:
                self.say("driver", "3.3.1", f"descriptor {index} belongs to a buffer in flight")
            self.owners[index] = head
        self.in_flight[head] = chain
