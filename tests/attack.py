"""A device under attack: a hostile driver places what it likes in the ring, and what must always hold is checked."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pyvirtio import Chain, Device, VirtQueue, queue
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.queue import HANG, Queue, Range
from pyvirtio.testing.ring import INDIRECT, NEXT, Desc

RING = 16


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


class Placing:
    """Puts descriptors into a ring as they are, `packed` or split; with `in_table` into an indirect table."""

    def __init__(self, queue: Queue, *, in_table: bool, packed: bool) -> None:
        self.queue, self.ring = queue, queue.ring
        self.in_table, self.packed = in_table, packed

    def place(self, *descs: Desc) -> None:
        """Put descriptors into the table as they are, and offer the first; a packed ring links what stands in a row."""
        if self.in_table:
            self.place_indirect(*descs)
            return
        if self.packed:
            self.ring.offer([desc._replace(flags=desc.flags & ~NEXT) for desc in descs], 0)
            return
        for index, desc in enumerate(descs):
            self.ring.write_desc(index, desc)
        self.ring.offer(0)

    def place_indirect(self, *descs: Desc, flags: int = INDIRECT, length: int | None = None) -> Range:
        """Put descriptors into an indirect table, and offer it; return where it is."""
        address, size = self.queue.place_table(descs)
        self.offer(Desc(address, size if length is None else length, flags))
        return address, size

    def offer(self, desc: Desc) -> None:
        """One descriptor, as it is."""
        if self.packed:
            self.ring.offer([desc], 0)
        else:
            self.ring.write_desc(0, desc)
            self.ring.offer(0)


class Attack(Placing):
    """A hostile driver of an `Echo`, next to another device that must not notice.

    With `in_table` the chains are placed in an indirect table, and with `packed` in a packed ring, so that each
    malformed chain is tried in all places where it can stand.
    """

    def __init__(
        self, guest: Guest, *, event_idx: bool, in_table: bool = False, packed: bool = False, features: int = ~0
    ) -> None:
        self.guest = guest
        self.bystander = guest.plug(Echo(), name="bystander")
        self.driver: VirtioDriver = guest.plug(
            Echo(), name="victim", event_idx=event_idx, packed=packed, features=features
        )
        super().__init__(self.driver.echoq, in_table=in_table, packed=packed)
        self.queue.polling = True
        self.buffer = guest.heap.allocate(4096)

    def breaks(self, reason: str, *, writable: Sequence[Range] = ()) -> None:
        """Send what was placed: the device must ask for a reset because of it, and recover."""
        with self.harmless(writable):
            self.send()
            assert reason in self.driver.wait_needs_reset()
        assert not self.ring.has_used
        assert not self.queue.strays
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
        with self.guest.only_writes(*self.ring.device_ranges, *self.ring.driver_ranges, *writable):
            yield
        assert echo(self.bystander.echoq) == b"hello"

    def recovers(self) -> None:
        """A reset by the driver, and all is well."""
        self.driver.start()
        assert echo(self.driver.echoq, b"again") == b"again"
