"""The descriptor chains of a split ring as the specification wants them (virtio 1.3, 2.7.4 and 2.7.5).

Not what the core does with a chain, which is one verdict: everything that is wrong with it, each with its section.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pyvirtio._core import GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4
DESC = struct.Struct("<QIHH")


class Desc(NamedTuple):
    """One descriptor, as it is in memory."""

    address: int
    length: int
    flags: int
    next: int


@dataclass
class Chain:
    """A buffer: its descriptors in the table of the ring, its device-writable bytes, and what is wrong with it."""

    indexes: list[int] = field(default_factory=list)
    writable: int = 0
    total: int = 0
    faults: list[tuple[str, str]] = field(default_factory=list)
    """(section, text) of each violation."""

    def fault(self, section: str, text: str) -> None:
        self.faults.append((section, text))

    def add(self, memory: GuestMemory, desc: Desc) -> None:
        """A descriptor that is no table."""
        if desc.flags & ~(NEXT | WRITE):
            self.fault("2.7.5", f"descriptor flags {desc.flags:#x}")
        if desc.flags & WRITE:
            self.writable += desc.length
        elif self.writable:
            self.fault("2.7.4.2", "a device-readable descriptor behind a device-writable one")
        self.total += desc.length
        if desc.length and not in_ram(memory, desc.address, desc.length):
            self.fault("2.7.5", f"{desc.length} bytes at {desc.address:#x} are not all RAM")


def walk(memory: GuestMemory, table: int, size: int, head: int, *, indirect: bool) -> Chain:
    """Follow the chain that starts at `head` of a ring's table; `indirect` is whether the feature was agreed."""
    chain = Chain()
    for index, desc in _linked(chain, memory, table, size, head):
        chain.indexes.append(index)
        if not desc.flags & INDIRECT:
            chain.add(memory, desc)
        elif not indirect:
            chain.fault("2.7.5.3.1", "an indirect descriptor without VIRTIO_F_INDIRECT_DESC")
        else:
            _walk_table(chain, memory, desc, size)
    if chain.total > 1 << 32:
        chain.fault("2.7.5.2", f"a chain of {chain.total} bytes")
    return chain


def _walk_table(chain: Chain, memory: GuestMemory, desc: Desc, size: int) -> None:
    entries = desc.length // DESC.size
    if desc.flags & NEXT:
        chain.fault("2.7.5.3.1", "a descriptor with both INDIRECT and NEXT")
    if not entries or desc.length % DESC.size or not in_ram(memory, desc.address, desc.length):
        chain.fault("2.7.5.3", f"an indirect table of {desc.length} bytes at {desc.address:#x}")
        return
    if entries > size:
        chain.fault("2.7.5.3.1", f"an indirect table of {entries} descriptors, the queue has {size}")
    for _, inner in _linked(chain, memory, desc.address, min(entries, 1 << 16), 0):
        if inner.flags & INDIRECT:
            chain.fault("2.7.5.3.1", "an indirect descriptor in an indirect table")
            return
        chain.add(memory, inner)


def _linked(chain: Chain, memory: GuestMemory, table: int, size: int, index: int) -> Iterator[tuple[int, Desc]]:
    """(index, descriptor) of a chain in one table, no further than the table is long."""
    for _ in range(size):
        if index >= size:
            chain.fault("2.7.5", f"descriptor {index} of a table with {size}")
            return
        desc = Desc(*DESC.unpack(memory.read(table + DESC.size * index, DESC.size)))
        yield index, desc
        if not desc.flags & NEXT or desc.flags & INDIRECT:
            return
        index = desc.next
    chain.fault("2.7.5.2", "a loop of descriptors")


def in_ram(memory: GuestMemory, address: int, length: int) -> bool:
    """Whether it all is RAM: also across the border of two regions."""
    while length:
        region = next((r for r in memory.regions if r[0] <= address < r[0] + r[1]), None)
        if region is None:
            return False
        here = min(length, region[0] + region[1] - address)
        address, length = address + here, length - here
    return True
