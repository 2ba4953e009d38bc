"""What a device has to do with the chains of a ring, by the specification; and a device that answers."""

import struct
from collections.abc import Iterator
from typing import Any
from zlib import crc32

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.spec import DeviceId, Feature
from pyvirtio.testing import Guest
from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.packed import AVAIL, DESC_SIZE, FLAGS_AT, USED, PackedRing, Place
from pyvirtio.testing.queue import Range
from pyvirtio.testing.ring import INDIRECT, NEXT, WRITE, Desc, SplitRing

DESC = struct.Struct("<QIHH")
"""Address, length, buffer id and flags of a descriptor in a packed ring."""
SMALL = 128 << 10
"""Bytes of guest RAM: all of it is compared after each batch."""
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
    """A copy of guest RAM, by the address of each region, which are in order."""

    def __init__(self, guest: Guest) -> None:
        self.regions = {start: bytearray(guest.memory.read(start, size)) for start, size in guest.ram}

    def pieces(self, address: int, length: int) -> list[tuple[bytearray, slice]]:
        """What a range is made of; `Malformed` unless all of it is RAM."""
        found = []
        for start, region in self.regions.items():
            at = address - start
            if 0 <= at < len(region):
                n = min(length, len(region) - at)
                found.append((region, slice(at, at + n)))
                address, length = address + n, length - n
                if not length:
                    return found
        if length:
            raise Malformed(f"{address:#x} is no RAM")
        return found

    def read(self, address: int, length: int) -> bytes:
        return b"".join([region[part] for region, part in self.pieces(address, length)])

    def write(self, address: int, data: bytes) -> None:
        for region, part in self.pieces(address, len(data)):
            n = part.stop - part.start
            region[part], data = data[:n], data[n:]


class Model(Memory):
    """What becomes of guest memory and of a ring when the device serves what was placed in it.

    To be made before that is published: the device may look at any time.
    """

    def __init__(self, guest: Guest, ring: Any, *, indirect: bool) -> None:
        super().__init__(guest)
        self.ring, self.indirect = ring, indirect

    def run(self) -> bool:
        """Do what the device has to do; False where it has to break."""
        self.publish()
        try:
            self.serve()
        except Malformed:
            return False
        return True

    def publish(self) -> None:
        """What the driver will do."""
        raise NotImplementedError

    def serve(self) -> None:
        raise NotImplementedError

    def reached(self) -> bool:
        """Whether the device has written to the ring all that the model has."""
        raise NotImplementedError

    def go_on(self) -> None:
        """Tell the ring where the device stands."""

    @property
    def events(self) -> list[Range]:
        """Of the ring, what the device may change at any time."""
        raise NotImplementedError

    def answered(self, readable: list[Desc], writable: list[Desc]) -> int:
        """Fill the device-writable buffers; how many bytes were said."""
        data = b"".join(self.read(desc.address, desc.length) for desc in readable)
        said = reply = answer(data, sum(desc.length for desc in writable))
        for desc in writable:
            self.write(desc.address, reply[: desc.length])
            reply = reply[desc.length :]
        return len(said)


class SplitModel(Model):
    """Of a split ring (virtio 1.3, 2.7)."""

    ring: SplitRing

    def publish(self) -> None:
        old = self.ring.avail_idx
        self.slots = range(old, old + (self.ring.next_avail - old & 0xFFFF))
        self.write(self.ring.avail + 2, self.ring.next_avail.to_bytes(2, "little"))

    def serve(self) -> None:
        ring, used = self.ring, self.ring.used_idx
        if len(self.slots) > ring.size:
            raise Malformed("more heads than entries")
        for slot in self.slots:
            head = int.from_bytes(self.read(ring.avail + 4 + 2 * (slot % ring.size), 2), "little")
            length = self.answered(*self.chain(ring, head, self.indirect))
            self.write(ring.used + 4 + 8 * (used % ring.size), struct.pack("<II", head, length))
            used = (used + 1) & 0xFFFF
            self.write(ring.used + 2, used.to_bytes(2, "little"))

    def reached(self) -> bool:
        return self.ring.used_idx == int.from_bytes(self.read(self.ring.used + 2, 2), "little")

    @property
    def events(self) -> list[Range]:
        return [(self.ring.used, 2), (self.ring.used + 4 + 8 * self.ring.size, 2)]

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
            self.pieces(desc.address, desc.length)
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
                self.pieces(desc.address, desc.length)
                yield from self._walk(desc.address, desc.length // 16, 0, largest, False)
                return
            yield desc
            if not desc.flags & NEXT:
                return
            index = desc.next
        raise Malformed("a loop")


class PackedModel(Model):
    """Of a packed ring (virtio 1.3, 2.8)."""

    ring: PackedRing

    def publish(self) -> None:
        self.at = self.ring.next_used
        for index, flags in self.ring.withheld:
            self.write(self.ring.desc + DESC_SIZE * index + FLAGS_AT, flags.to_bytes(2, "little"))

    def serve(self) -> None:
        ring = self.ring
        while self._available(self.entry(ring.desc, self.at.index), self.at):
            buffers, descs, id_ = self._chain(ring, self.at, self.indirect)
            length = self.answered(
                [desc for desc in buffers if not desc.flags & WRITE], [desc for desc in buffers if desc.flags & WRITE]
            )
            flags = self.at.used | (WRITE if length else 0)
            used = Desc(self.entry(ring.desc, self.at.index).address, length, flags, id_)
            self.put(ring.desc, self.at.index, used)
            self.at = self.at.after(descs, ring.size)

    def reached(self) -> bool:
        where = (self.ring.desc, DESC_SIZE * self.ring.size)
        return self.ring.memory.read(*where) == self.read(*where)

    def go_on(self) -> None:
        self.ring.next_avail = self.ring.next_used = self.at

    @property
    def events(self) -> list[Range]:
        return [(self.ring.used, 4)]

    def entry(self, table: int, index: int) -> Desc:
        address, length, id_, flags = DESC.unpack(self.read(table + DESC_SIZE * index, DESC_SIZE))
        return Desc(address, length, flags, id_)

    def put(self, table: int, index: int, desc: Desc) -> None:
        self.write(table + DESC_SIZE * index, DESC.pack(desc.address, desc.length, desc.next, desc.flags))

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
        self.pieces(desc.address, desc.length)
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
            self.pieces(desc.address, desc.length)
        return buffers


def model_of(driver: VirtioDriver) -> Model:
    ring, indirect = driver.queues[0].ring, bool(driver.features & Feature.INDIRECT_DESC)
    return (PackedModel if isinstance(ring, PackedRing) else SplitModel)(driver.guest, ring, indirect=indirect)


def compare(guest: Guest, model: Model) -> None:
    """All of guest memory is what the model says, but for what the device may change at any time."""
    now = Memory(guest)
    for address, length in model.events:
        model.write(address, now.read(address, length))
    for start, region in model.regions.items():
        assert now.regions[start] == region


def recovers(driver: VirtioDriver) -> None:
    """A reset by the driver, and all is well."""
    driver.start()
    buffer = driver.queues[0].add(b"recovered?", writable=8)
    driver.queues[0].kick()
    assert buffer.wait() == answer(b"recovered?", 8)
