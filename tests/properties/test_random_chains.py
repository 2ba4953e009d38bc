"""Random descriptor chains, well formed and mutated, against a model that walks them as the specification says."""

import time
from collections.abc import Iterator
from itertools import count
from random import Random
from zlib import crc32

import pytest
from exploring import FACTOR, SEED, budget, exploring
from hypothesis import given
from hypothesis import strategies as st

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.spec import DeviceId, Feature
from pyvirtio.testing import Guest, strategies
from pyvirtio.testing.chaos import Batch, near_borders
from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.queue import HANG
from pyvirtio.testing.ring import INDIRECT, NEXT, WRITE, Desc, SplitRing

SMALL = 128 << 10
"""Bytes of guest RAM: all of it is compared after each batch."""
CHAINS = 10_000
"""Of each of the ten variants."""
U32 = 2**32 - 1


def answer(data: bytes, room: int) -> bytes:
    """What the device says to `data`: it depends on every byte, and leaves a quarter of the room alone."""
    wanted = room - room // 4
    return (crc32(data).to_bytes(4, "little") * (wanted // 4 + 1))[:wanted]


class Oracle(Device, id=DeviceId.CONSOLE):
    """Answers every chain with `answer`."""

    @queue(size=16)
    def askq(self, vq: VirtQueue) -> None:
        for chain in vq:
            data = chain.read()
            chain.write(answer(data, chain.writable))
            chain.complete()


class Malformed(Exception):
    """The chain that the model walks is one that breaks the device."""


class Memory:
    """A copy of guest RAM, and how the specification reads chains in it."""

    def __init__(self, guest: Guest) -> None:
        self.regions = {start: bytearray(guest.memory.read(start, size)) for start, size in guest.ram}

    def _pieces(self, address: int, length: int) -> Iterator[tuple[bytearray, slice]]:
        while length:
            start = max((start for start in self.regions if start <= address), default=None)
            if start is None or address - start >= len(self.regions[start]):
                raise Malformed(f"{address:#x} is no RAM")
            at = address - start
            n = min(length, len(self.regions[start]) - at)
            yield self.regions[start], slice(at, at + n)
            address, length = address + n, length - n

    def read(self, address: int, length: int) -> bytes:
        return b"".join(region[part] for region, part in self._pieces(address, length))

    def write(self, address: int, data: bytes) -> None:
        for region, part in list(self._pieces(address, len(data))):
            n = part.stop - part.start
            region[part], data = data[:n], data[n:]

    def desc(self, table: int, index: int) -> Desc:
        return Desc.unpack(self.read(table + 16 * index, 16))

    def chain(self, ring: SplitRing, head: int, indirect: bool) -> tuple[list[Desc], list[Desc]]:
        """The readable and the writable buffers of a chain."""
        readable: list[Desc] = []
        writable: list[Desc] = []
        for desc in self._walk(ring.desc, ring.size, head, ring.size, indirect):
            if writable and not desc.flags & WRITE:
                raise Malformed("readable after writable")
            if desc.length:
                (writable if desc.flags & WRITE else readable).append(desc)
        for desc in readable + writable:
            self.read(desc.address, desc.length)
        if sum(desc.length for desc in readable + writable) > U32:
            raise Malformed("too long")
        return readable, writable

    def _walk(self, table: int, entries: int, index: int, largest: int, indirect: bool) -> Iterator[Desc]:
        for _ in range(entries):
            if index >= entries:
                raise Malformed(f"{index} is past the table")
            desc = self.desc(table, index)
            if desc.flags & INDIRECT:
                bad = not indirect or desc.flags & NEXT or desc.length % 16 or not 0 < desc.length <= 16 * largest
                if bad:
                    raise Malformed("no table that a chain may have")
                self.read(desc.address, desc.length)
                yield from self._walk(desc.address, desc.length // 16, 0, largest, False)
                return
            yield desc
            if not desc.flags & NEXT:
                return
            index = desc.next
        raise Malformed("a loop")

    def serve(self, ring: SplitRing, heads: list[int], indirect: bool) -> Iterator[tuple[int, int]]:
        """Do what the device has to do; the used elements, `Malformed` where it has to break."""
        if len(heads) > ring.size:
            raise Malformed("more heads than entries")
        for head in heads:
            readable, writable = self.chain(ring, head, indirect)
            data = b"".join(self.read(desc.address, desc.length) for desc in readable)
            said = reply = answer(data, sum(desc.length for desc in writable))
            for desc in writable:
                self.write(desc.address, reply[: desc.length])
                reply = reply[desc.length :]
            yield head, len(said)


class Ring:
    """A ring that batches go to, and what the device has used of it so far."""

    def __init__(self, driver: VirtioDriver) -> None:
        self.vq = driver.queues[0]
        self.ring = self.vq.ring
        self.used: list[tuple[int, int]] = []

    def offer(self, heads: list[int]) -> None:
        for head in heads:
            self.ring.offer(head)
        self.vq.publish()
        self.vq.notify()


def check(driver: VirtioDriver, placed: Ring, batch: Batch) -> bool:
    """Offer one batch and compare; whether the device has survived it."""
    guest, ring = driver.guest, placed.ring
    heads = batch.place(placed.vq)
    for slot, head in enumerate(heads):
        ring.write_avail(ring.next_avail + slot, head)
    model, broken = Memory(guest), False
    try:
        for element in model.serve(ring, heads, bool(driver.features & Feature.INDIRECT_DESC)):
            placed.used.append(element)
    except Malformed:
        broken = True
    placed.offer(heads)
    driver.may_break = broken
    wait(driver, placed, broken)
    compare(guest, model, ring)
    for slot, element in list(enumerate(placed.used))[-ring.size :]:
        assert ring.used_element(slot) == element
    return not broken


def wait(driver: VirtioDriver, placed: Ring, broken: bool) -> None:
    """Until every chain is used, and the device has broken if it is to break.

    Looks at memory, not at interrupts: the driver must not write to the ring meanwhile.
    """
    expected, deadline = len(placed.used) & 0xFFFF, time.monotonic() + HANG
    while placed.ring.used_idx != expected or bool(driver.why_broken) is not broken:
        assert time.monotonic() < deadline, f"used {placed.ring.used_idx}, wanted {expected}; {driver.why_broken}"
        time.sleep(0.0002)


def compare(guest: Guest, model: Memory, ring: SplitRing) -> None:
    """All of guest memory is what the model says, but for the used ring and the avail index."""
    model.write(ring.avail + 2, ring.next_avail.to_bytes(2, "little"))
    model.write(ring.used, guest.memory.read(*ring.used_range))
    for start, region in model.regions.items():
        assert guest.memory.read(start, len(region)) == region


def recovers(driver: VirtioDriver) -> None:
    """A reset by the driver, and all is well."""
    driver.start()
    buffer = driver.queues[0].add(b"recovered?", writable=8)
    driver.queues[0].kick()
    assert buffer.wait() == answer(b"recovered?", 8)


everywhere = pytest.mark.guest(transport=("modern", "legacy", "vhost-user"), memory=SMALL)


@everywhere
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_the_device_serves_what_is_a_chain_and_breaks_on_anything_else(guest: Guest, event_idx: bool) -> None:
    driver = guest.plug(Oracle(), event_idx=event_idx, start=False)
    sizes = st.sampled_from([None] if guest.transport == "legacy" else [2, 4, 8, 16])

    @exploring
    @budget(25)
    @given(st.lists(strategies.batches(guest), min_size=1, max_size=3), sizes, st.sampled_from([True, True, False]))
    def explore(sequence: list[Batch], size: int | None, indirect: bool) -> None:
        driver.queue_size = size
        driver.features_wanted = ~0 if indirect else ~int(Feature.INDIRECT_DESC)
        driver.start()
        placed = Ring(driver)
        for batch in sequence:
            if not check(driver, placed, batch):
                break
        recovers(driver)

    explore()


@everywhere
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_very_many_chains(guest: Guest, event_idx: bool) -> None:
    """100 000 in all variants; what fails here says how to repeat it, the test above can make it smaller."""
    driver = guest.plug(Oracle(), event_idx=event_idx)
    placed, chains, places = Ring(driver), 0, near_borders(guest.ram)
    for number in count():
        batch = Batch.drawn(Random(f"{SEED if FACTOR else 0} {number}"), places)
        if not check(driver, placed, batch):
            driver.start()
            placed = Ring(driver)
        chains += len(batch.chains)
        if chains >= CHAINS * max(FACTOR, 1):
            break
    recovers(driver)
