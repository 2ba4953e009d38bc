"""Random descriptor chains in a packed ring, well formed and mutated, against a model of the specification (2.8)."""

import struct
import time
from collections.abc import Iterator
from itertools import count
from random import Random

import pytest
from chain_model import SMALL, U32, Malformed, Memory, Oracle, answer, compare, recovers
from exploring import FACTOR, SEED, budget, exploring
from hypothesis import given
from hypothesis import strategies as st

from pyvirtio.spec import Feature
from pyvirtio.testing import Guest, strategies
from pyvirtio.testing.chaos import LIMITS, Batch, Mutation, near_borders
from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.packed import AVAIL, DESC_SIZE, USED, PackedRing, Place
from pyvirtio.testing.queue import HANG
from pyvirtio.testing.ring import INDIRECT, NEXT, WRITE, Desc

CHAINS = 5_000
"""Of each of the six variants."""
DESC = struct.Struct("<QIHH")


class PackedMemory(Memory):
    """A copy of guest RAM, and how the specification reads a packed ring in it."""

    def entry(self, table: int, index: int) -> Desc:
        address, length, id_, flags = DESC.unpack(self.read(table + DESC_SIZE * index, DESC_SIZE))
        return Desc(address, length, flags, id_)

    def put(self, table: int, index: int, desc: Desc) -> None:
        self.write(table + DESC_SIZE * index, DESC.pack(desc.address, desc.length, desc.next, desc.flags))

    def serve(self, ring: PackedRing, at: Place, indirect: bool) -> Iterator[Place]:  # type: ignore[override]
        """Do what the device has to do; yields where it goes on. `Malformed` where it has to break."""
        while self._available(self.entry(ring.desc, at.index), at):
            buffers, descs, id_ = self._chain(ring, at, indirect)
            length = self._answer(buffers)
            used = Desc(self.entry(ring.desc, at.index).address, length, at.used | (WRITE if length else 0), id_)
            self.put(ring.desc, at.index, used)
            at = at.after(descs, ring.size)
            yield at

    @staticmethod
    def _available(desc: Desc, at: Place) -> bool:
        return desc.flags & (AVAIL | USED) == at.available

    def _chain(self, ring: PackedRing, at: Place, indirect: bool) -> tuple[list[Desc], int, int]:
        """Buffers, number of descriptors and buffer id of the chain there."""
        buffers: list[Desc] = []
        for n in range(ring.size):
            desc = self.entry(ring.desc, at.index)
            if not self._available(desc, at):
                raise Malformed("the tail is not available")
            buffers += self._table(desc, ring.size, n, indirect) if desc.flags & INDIRECT else [desc]
            if not desc.flags & NEXT:
                if desc.next >= ring.size:
                    raise Malformed("no buffer id")
                return self._checked(buffers), n + 1, desc.next
            at = at.after(1, ring.size)
        raise Malformed("longer than the ring")

    def _table(self, desc: Desc, largest: int, n: int, indirect: bool) -> list[Desc]:
        bad = n or not indirect or desc.flags & NEXT or desc.length % 16 or not 0 < desc.length <= 16 * largest
        if bad:
            raise Malformed("no table that a chain may have")
        self.read(desc.address, desc.length)
        entries = [self.entry(desc.address, index) for index in range(desc.length // 16)]
        if any(entry.flags & INDIRECT for entry in entries):
            raise Malformed("a table in a table")
        return entries

    def _checked(self, buffers: list[Desc]) -> list[Desc]:
        seen = False
        for desc in buffers:
            if seen and not desc.flags & WRITE:
                raise Malformed("readable after writable")
            seen |= bool(desc.flags & WRITE and desc.length)
        if sum(desc.length for desc in buffers) > U32:
            raise Malformed("too long")
        for desc in buffers:
            self.read(desc.address, desc.length)
        return buffers

    def _answer(self, buffers: list[Desc]) -> int:
        writable = [desc for desc in buffers if desc.flags & WRITE]
        data = b"".join(self.read(desc.address, desc.length) for desc in buffers if not desc.flags & WRITE)
        said = reply = answer(data, sum(desc.length for desc in writable))
        for desc in writable:
            self.write(desc.address, reply[: desc.length])
            reply = reply[desc.length :]
        return len(said)


class Ring:
    """A packed ring that batches go to, from where the device is on."""

    def __init__(self, driver: VirtioDriver) -> None:
        self.vq = driver.queues[0]
        self.ring: PackedRing = self.vq.ring
        self.at = Place()

    def place(self, batch: Batch) -> int:
        """Write a batch; the first descriptor stays unavailable, its flags are returned."""
        ring, at, ids = self.ring, self.at, [index for index in batch.order if index < self.ring.size]
        written: list[tuple[int, int]] = []
        room, first = ring.size, 0
        for chain in batch.chains:
            descs = chain.buffers
            if chain.table is not None:
                self.vq.memory.write(chain.table, ring.table(descs))
                written += [(chain.table, index) for index in range(len(descs))]
                descs = [Desc(chain.table, 16 * len(descs), INDIRECT)]
            if len(descs) > room:
                break
            room, id_ = room - len(descs), ids.pop()
            for n, desc in enumerate(descs):
                flags = desc.flags | (NEXT if n < len(descs) - 1 else 0) | at.available
                written.append((ring.desc, at.index))
                if at == self.at:
                    first, flags = flags, 0
                self._put(*written[-1], desc._replace(flags=flags, next=id_))
                at = at.after(1, ring.size)
        for mutation in batch.mutations if written else []:
            first = self._mutate(written, mutation, first)
        return first

    def _put(self, table: int, index: int, desc: Desc) -> None:
        data = DESC.pack(desc.address, desc.length, desc.next, desc.flags)
        self.vq.memory.write(table + DESC_SIZE * index, data)

    def _mutate(self, written: list[tuple[int, int]], mutation: Mutation, first: int) -> int:
        if mutation.place not in LIMITS:
            return first
        table, index = written[mutation.which % len(written)]
        address, length, id_, flags = DESC.unpack(self.vq.memory.read(table + DESC_SIZE * index, DESC_SIZE))
        desc, value = Desc(address, length, flags, id_), mutation.value % LIMITS[mutation.place]
        if mutation.place == "flags" and value < 8:
            value |= flags & ~7  # another kind of descriptor in the same lap
        if mutation.place == "flags" and (table, index) == (self.ring.desc, self.at.index):
            return value if value >= 8 else value | first & ~7
        self._put(table, index, desc._replace(**{mutation.place: value}))
        return first


def check(driver: VirtioDriver, placed: Ring, batch: Batch) -> bool:
    """Offer one batch and compare; whether the device has survived it."""
    ring, start = placed.ring, placed.at
    first = placed.place(batch)
    model, broken = PackedMemory(driver.guest), False
    model.put(ring.desc, start.index, model.entry(ring.desc, start.index)._replace(flags=first))
    try:
        for placed.at in model.serve(ring, start, bool(driver.features & Feature.INDIRECT_DESC)):
            pass
    except Malformed:
        broken = True
    driver.may_break = broken
    ring.write_flags(start.index, first)
    placed.vq.notify()
    wait(driver, ring, model, broken)
    compare(driver.guest, model, (ring.used, 4))
    return not broken


def wait(driver: VirtioDriver, ring: PackedRing, model: PackedMemory, broken: bool) -> None:
    """Until the ring is as the model says, and the device has broken if it is to break."""
    at, deadline = (ring.desc, DESC_SIZE * ring.size), time.monotonic() + HANG
    expected = model.read(*at)
    while driver.memory.read(*at) != expected or bool(driver.why_broken) is not broken:
        assert time.monotonic() < deadline, f"broken: {broken}, and {driver.why_broken}"
        time.sleep(0.0002)


everywhere = pytest.mark.guest(transport=("modern", "vhost-user"), memory=SMALL)


@everywhere
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_a_packed_ring_serves_what_is_a_chain_and_breaks_on_anything_else(guest: Guest, event_idx: bool) -> None:
    driver = guest.plug(Oracle(), event_idx=event_idx, packed=True, start=False)

    @exploring
    @budget(25)
    @given(
        st.lists(strategies.batches(guest), min_size=1, max_size=3),
        st.sampled_from([2, 3, 5, 8, 16]),
        st.sampled_from([True, True, False]),
    )
    def explore(sequence: list[Batch], size: int, indirect: bool) -> None:
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
def test_very_many_chains_in_a_packed_ring(guest: Guest, event_idx: bool) -> None:
    """What fails here says how to repeat it; the test above can make it smaller."""
    driver = guest.plug(Oracle(), event_idx=event_idx, packed=True)
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
