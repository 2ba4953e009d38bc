"""A device under attack: a hostile driver places what it likes in the ring, and what must always hold is checked."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pyvirtio import Chain, Device, VirtQueue, queue
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.queue import HANG, Queue, Range
from pyvirtio.testing.ring import INDIRECT, Desc

RING = 16
AVAIL_HEADER = 4


class Echo(Device, id=63):
    """Reads up to 64 KiB of a chain and writes as much back, or filler if there was nothing to read."""

    MAX_BYTES = 64 * 1024

    @queue(size=RING)
    def echoq(self, vq: VirtQueue) -> None:
        for chain in vq:
            data = chain.read(min(chain.readable, self.MAX_BYTES))
            chain.write(data or b"\xa5" * min(chain.writable, self.MAX_BYTES))
            chain.complete()


class Keeper(Device, id=63):
    """Keeps the chains, for the test to complete."""

    def __init__(self) -> None:
        self.chains: list[Chain] = []
        self.kept = threading.Semaphore(0)

    @queue(size=RING)
    def requestq(self, vq: VirtQueue) -> None:
        for chain in vq:
            self.chains.append(chain)
            self.kept.release()

    def take(self) -> Chain:
        assert self.kept.acquire(timeout=HANG)
        return self.chains.pop(0)


def echo(q: Queue, data: bytes = b"hello") -> bytes:
    buffer = q.add(data, len(data))
    q.kick()
    return buffer.wait()


class Attack:
    """A hostile driver of an `Echo`, next to another device that must not notice.

    With `in_table` the chains are placed in an indirect table, so that each malformed chain is tried in both places.
    """

    def __init__(self, guest: Guest, *, event_idx: bool, in_table: bool = False, features: int = ~0) -> None:
        self.guest, self.in_table = guest, in_table
        self.bystander = guest.plug(Echo(), name="bystander")
        self.driver: VirtioDriver = guest.plug(Echo(), name="victim", event_idx=event_idx, features=features)
        self.queue: Queue = self.driver.echoq
        self.queue.polling = True
        self.ring = self.queue.ring
        self.buffer = guest.heap.allocate(4096)

    def place(self, *descs: Desc) -> None:
        """Put descriptors into the table as they are, and offer the first."""
        if self.in_table:
            self.place_indirect(*descs)
            return
        for index, desc in enumerate(descs):
            self.ring.write_desc(index, desc)
        self.ring.offer(0)

    def place_indirect(self, *descs: Desc, flags: int = INDIRECT, length: int | None = None) -> Range:
        """Put descriptors into an indirect table, and offer it; return where it is."""
        address, size = self.queue.place_table(descs)
        self.ring.write_desc(0, Desc(address, size if length is None else length, flags))
        self.ring.offer(0)
        return address, size

    def breaks(self, reason: str, *, writable: Sequence[Range] = ()) -> None:
        """Send what was placed: the device must ask for a reset because of it, and recover."""
        with self.harmless(writable):
            self.send()
            assert reason in self.driver.wait_needs_reset()
        assert self.ring.used_idx == 0
        self.recovers()

    def is_served(self, *, times: int = 1, writable: Sequence[Range] = ()) -> list[int]:
        """Send what was placed: the device must complete it; return the used lengths."""
        with self.harmless(writable):
            self.send()
            self.queue.wait_until(lambda: len(self.queue.strays) >= times, "it is served")
        lengths = [length for _, length in self.queue.strays]
        self.recovers()
        return lengths

    def survives(self, *, writable: Sequence[Range] = ()) -> None:
        """Send what was placed: it may be served or break the device, but nothing else."""
        self.driver.may_break = True
        with self.harmless(writable):
            self.send()
            self.queue.wait_until(lambda: bool(self.queue.strays or self.driver.why_broken), "there is a verdict")
        self.recovers()

    def send(self) -> None:
        self.ring.publish()
        self.queue.notify()

    @contextmanager
    def harmless(self, writable: Sequence[Range] = ()) -> Iterator[None]:
        """No guest byte changes that neither the device nor `publish` may write, and the other device serves."""
        mine = [self.ring.used_range, (self.ring.avail, AVAIL_HEADER)]
        if self.ring.event_idx:
            mine.append((self.ring.avail + AVAIL_HEADER + 2 * self.ring.size, 2))  # used_event, written by `collect`
        with self.guest.only_writes(*mine, *writable):
            yield
        assert echo(self.bystander.echoq) == b"hello"

    def recovers(self) -> None:
        """A reset by the driver, and all is well."""
        self.driver.start()
        assert echo(self.driver.echoq, b"again") == b"again"
