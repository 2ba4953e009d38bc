"""What a device has to do with the chains of a split ring, by the specification; and a device that answers."""

from collections.abc import Iterator
from zlib import crc32

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.spec import DeviceId
from pyvirtio.testing import Guest
from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.queue import Range
from pyvirtio.testing.ring import INDIRECT, NEXT, WRITE, Desc, SplitRing

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


def compare(guest: Guest, model: Memory, own: Range) -> None:
    """All of guest memory is what the model says, but for what is the device's `own` and may change at any time."""
    now = Memory(guest)
    for memory in (now, model):
        memory.write(own[0], bytes(own[1]))
    for start, region in model.regions.items():
        assert now.regions[start] == region


def recovers(driver: VirtioDriver) -> None:
    """A reset by the driver, and all is well."""
    driver.start()
    buffer = driver.queues[0].add(b"recovered?", writable=8)
    driver.queues[0].kick()
    assert buffer.wait() == answer(b"recovered?", 8)
