"""Random descriptor chains, well formed and mutated, against a model that walks them as the specification says."""

import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal
from zlib import crc32

import pytest
from exploring import budget, exploring
from hypothesis import event, given
from hypothesis import strategies as st

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.spec import DeviceId, Feature
from pyvirtio.testing import Guest
from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.queue import HANG
from pyvirtio.testing.ring import INDIRECT, NEXT, WRITE, Desc, SplitRing

BORDER, END, HIGH = 2 << 20, 3 << 20, 4 << 30
"""Where the second region of guest RAM starts, where a hole starts, and where the third region does."""
ENTRY = struct.Struct("<QIHH")
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
        return Desc(*ENTRY.unpack(self.read(table + 16 * index, 16)))

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


@dataclass
class Chain:
    """One request to be placed: its buffers, and the address of its table if it is indirect."""

    buffers: list[Desc]
    table: int | None


@dataclass
class Batch:
    """What is made available at once; a mutation is a place (see `Setting.mutate`) and what is put there."""

    chains: list[Chain]
    order: list[int]
    """The indexes that the descriptors get."""
    mutations: list[tuple[str, int, int]] = field(default_factory=list)


addresses = st.one_of(
    st.integers(0x8000, 0x8400),
    st.integers(BORDER - 64, BORDER + 64),
    st.integers(END - 800, END - 600),
    st.integers(HIGH, HIGH + 600),
)
wild = st.one_of(
    addresses, st.integers(0, 2**64 - 1), st.sampled_from([END - 1, END, HIGH - 1, 0xE000_0000, 2**64 - 1, 0])
)
lengths = st.one_of(st.integers(1, 64), st.integers(0, 520), st.just(0))
places = st.sampled_from(["address", "length", "flags", "next", "head", "jump"])
values = {
    "address": wild,
    "length": st.one_of(st.integers(0, 300), st.sampled_from([16, 32, 272, 2**31, U32, U32 - 15])),
    "flags": st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF)),
    "next": st.one_of(st.integers(0, 16), st.integers(0, 0xFFFF)),
    "head": st.one_of(st.integers(0, 16), st.integers(0, 0xFFFF)),
    "jump": st.one_of(st.integers(0, 20), st.integers(0, 0xFFFF)),
}


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    sizes = draw(st.lists(st.tuples(addresses, lengths), min_size=1, max_size=5))
    readable = draw(st.integers(0, len(sizes)))
    buffers = [Desc(*where, 0 if n < readable else WRITE) for n, where in enumerate(sizes)]
    return Chain(buffers, draw(st.one_of(st.none(), addresses)))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    mutations = []
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2, 3]))):
        place = draw(places)
        mutations.append((place, draw(st.integers(0, 40)), draw(values[place])))
    return Batch(draw(st.lists(chains(), max_size=5)), draw(st.permutations(range(16))), mutations)


class Placing:
    """A driver's way to put batches into a ring; what it wrote may be mutated afterwards."""

    def __init__(self, driver: VirtioDriver) -> None:
        self.vq = driver.queues[0]
        self.ring, self.memory = self.vq.ring, driver.guest.memory
        self.written: list[int] = []
        """Addresses of the descriptors of this batch, in tables too."""
        self.used: list[tuple[int, int]] = []

    def place(self, batch: Batch) -> list[int]:
        """Write the descriptors of a batch as far as the ring has room; return the heads to be made available."""
        free = [index for index in batch.order if index < self.ring.size]
        self.written, heads = [], []
        for chain in batch.chains:
            if len(chain.buffers) > self.ring.size or len(free) < (1 if chain.table else len(chain.buffers)):
                continue
            if chain.table is None:
                indexes = [free.pop() for _ in chain.buffers]
                self._write(self.ring.desc, indexes, chain.buffers)
                heads.append(indexes[0])
            else:
                self._write(chain.table, list(range(len(chain.buffers))), chain.buffers)
                heads.append(free.pop())
                self._write(self.ring.desc, heads[-1:], [Desc(chain.table, 16 * len(chain.buffers), INDIRECT)])
        for mutation in batch.mutations:
            self._mutate(heads, *mutation)
        return heads

    def _write(self, table: int, indexes: list[int], descs: list[Desc]) -> None:
        for desc, (index, after) in zip(descs, pairwise([*indexes, -1]), strict=True):
            linked = desc if after < 0 else desc._replace(flags=desc.flags | NEXT, next=after)
            self.memory.write(table + 16 * index, linked.pack())
            self.written.append(table + 16 * index)

    def _mutate(self, heads: list[int], place: str, which: int, value: int) -> None:
        if place == "jump":
            heads.extend([heads[0] if heads else 0] * min(value, 0x7FFF))
        elif place == "head" and heads:
            heads[which % len(heads)] = value
        elif place in Desc._fields and self.written:
            at = self.written[which % len(self.written)]
            desc = Desc(*ENTRY.unpack(self.memory.read(at, 16)))
            limit = {"address": 2**64, "length": 2**32}.get(place, 2**16)
            self.memory.write(at, desc._replace(**{place: value % limit}).pack())

    def offer(self, heads: list[int]) -> None:
        for head in heads:
            self.ring.offer(head)
        self.vq.publish()
        self.vq.notify()


def check(driver: VirtioDriver, placing: Placing, batch: Batch) -> bool:
    """Offer one batch and compare; whether the device has survived it."""
    guest, ring = driver.guest, placing.ring
    heads = placing.place(batch)
    for slot, head in enumerate(heads):
        ring.write_avail(ring.next_avail + slot, head)
    model, broken = Memory(guest), False
    try:
        for element in model.serve(ring, heads, bool(driver.features & Feature.INDIRECT_DESC)):
            placing.used.append(element)
    except Malformed as error:
        event(str(error).split(" ", 1)[-1])
        broken = True
    placing.offer(heads)
    driver.may_break = broken
    wait(driver, placing, broken)
    compare(guest, model, ring)
    for slot, element in list(enumerate(placing.used))[-ring.size :]:
        assert ring.used_element(slot) == element
    return not broken


def wait(driver: VirtioDriver, placing: Placing, broken: bool) -> None:
    """Until every chain is used, and the device has broken if it is to break.

    Looks at memory, not at interrupts: the driver must not write to the ring meanwhile.
    """
    expected, deadline = len(placing.used) & 0xFFFF, time.monotonic() + HANG
    while placing.ring.used_idx != expected or bool(driver.why_broken) is not broken:
        assert time.monotonic() < deadline, f"used {placing.ring.used_idx}, wanted {expected}; {driver.why_broken}"
        time.sleep(0.0002)


def compare(guest: Guest, model: Memory, ring: SplitRing) -> None:
    """All of guest memory is what the model says, but for the used ring and the avail index."""
    model.write(ring.avail + 2, ring.next_avail.to_bytes(2, "little"))
    model.write(ring.used, guest.memory.read(*ring.used_range))
    for start, region in model.regions.items():
        assert guest.memory.read(start, len(region)) == region


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
@pytest.mark.parametrize("transport", ["modern", "legacy"])
def test_the_device_serves_what_is_a_chain_and_breaks_on_anything_else(
    guest: Guest, event_idx: bool, transport: Literal["modern", "legacy"]
) -> None:
    assert [start for start, _ in guest.ram] == [0, BORDER, HIGH]
    driver = guest.plug(Oracle(), transport=transport, event_idx=event_idx, start=False)
    sizes = st.sampled_from([2, 4, 8, 16] if transport == "modern" else [None])

    @exploring
    @budget(25)
    @given(st.lists(batches(), min_size=1, max_size=3), sizes, st.sampled_from([True, True, False]))
    def explore(sequence: list[Batch], size: int | None, indirect: bool) -> None:
        driver.queue_size = size
        driver.features_wanted = ~0 if indirect else ~int(Feature.INDIRECT_DESC)
        driver.start()
        placing = Placing(driver)
        for batch in sequence:
            if not check(driver, placing, batch):
                break
        driver.start()
        buffer = driver.queues[0].add(b"recovered?", writable=8)
        driver.queues[0].kick()
        assert buffer.wait() == answer(b"recovered?", 8)

    explore()
