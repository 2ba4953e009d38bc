"""Random drivers: descriptor chains and register accesses, drawn from a `random.Random`.

With a seeded generator they repeat; `pyvirtio.testing.strategies` draws the same from hypothesis, which shrinks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from pyvirtio.testing import placing
from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.packed import PackedRing
from pyvirtio.testing.queue import Queue
from pyvirtio.testing.registers import COMMON, LEGACY
from pyvirtio.testing.ring import WRITE, Desc

U16, U32, U64 = 2**16 - 1, 2**32 - 1, 2**64 - 1
NEAR = range(129)
PLACES = ("address", "length", "flags", "next", "head", "jump")


def near_borders(ram: Sequence[tuple[int, int]]) -> list[int]:
    """Addresses in each region of RAM, in its middle and near its end; across the end only where RAM goes on there."""
    starts = {start for start, _ in ram}
    middles = [start + size // 2 for start, size in ram]
    ends = [start + size - (64 if start + size in starts else 800) for start, size in ram]
    return middles + ends


@dataclass
class Chain:
    """One request to be placed: its buffers, and the address of its table if it is indirect."""

    buffers: list[Desc]
    table: int | None

    @classmethod
    def drawn(cls, random: Random, places: Sequence[int]) -> Chain:
        """A sound chain of up to five buffers; `places` are addresses with some room behind them."""
        count = random.randint(1, 5)
        readable = random.randint(0, count)
        buffers = [Desc(_address(random, places), _length(random), 0 if n < readable else WRITE) for n in range(count)]
        return cls(buffers, _address(random, places) if random.randint(0, 1) else None)


@dataclass
class Mutation:
    """What is changed after the chains were written: the `which`-th of the places of this kind gets `value`.

    In a packed ring "next" is the buffer id, and there are no heads nor indexes to jump.
    """

    place: str
    which: int
    value: int

    @classmethod
    def drawn(cls, random: Random, places: Sequence[int]) -> Mutation:
        place = random.choice(PLACES)
        return cls(place, random.randint(0, 40), _nonsense(random, place, places))


@dataclass
class Batch:
    """Chains that are made available at once, and what is wrong with them."""

    chains: list[Chain]
    order: list[int]
    """The indexes that the descriptors get, in this order; the ids that the buffers get in a packed ring."""
    mutations: list[Mutation]

    @classmethod
    def drawn(cls, random: Random, places: Sequence[int], *, size: int = 16) -> Batch:
        """Up to five chains for a ring of `size`, half of them as they should be."""
        order = random.sample(range(size), size)
        chains = [Chain.drawn(random, places) for _ in range(random.randint(0, 5))]
        count = random.choice([0, 0, 0, 1, 1, 2, 3])
        return cls(chains, order, [Mutation.drawn(random, places) for _ in range(count)])

    def place(self, vq: Queue) -> None:
        """Write the descriptors as far as the ring has room, whatever stood there; `vq.publish` makes them available.

        The ring is the caller's to reset once the device has stopped in the middle of it.
        """
        if isinstance(vq.ring, PackedRing):
            placing.packed(vq, vq.ring, self)
        else:
            placing.split(vq, vq.ring, self)


def _address(random: Random, places: Sequence[int]) -> int:
    return random.choice(places) + random.choice(NEAR)


def _length(random: Random) -> int:
    return random.randint(0, random.choice([0, 64, 520]))


def _nonsense(random: Random, place: str, places: Sequence[int]) -> int:
    """A value that could be meant for this place, or not at all."""
    if place == "address":
        return random.choice([_address(random, places), random.randint(0, U64), U64, 0xE000_0000, 0])
    if place == "length":
        return random.choice([random.randint(0, 300), 16, 32, 272, 2**31, U32, U32 - 15])
    if place == "jump":
        return random.randint(0, 20)
    small = {"flags": 7, "next": 16, "head": 16}[place]
    return random.choice([random.randint(0, small), random.randint(0, U16)])


class Access(NamedTuple):
    """One access to a function: to a BAR, or to configuration space with `bar` None; a read if there is no value."""

    bar: int | None
    offset: int
    size: int
    value: int | None

    @classmethod
    def drawn(cls, random: Random, sizes: dict[int, int]) -> Access:
        """`sizes` has the bytes of each BAR, by its index. Mostly accesses to where registers are."""
        bar = random.choice([*sizes, *sizes, None])
        size = random.choice([1, 2, 4])
        if bar is None:
            offset = random.randint(0, 255) & -size
        else:
            layout = COMMON if sizes[bar] > 256 else LEGACY
            known = random.choice(list(layout.values()))
            offset, size = random.choice([known, (random.randint(0, sizes[bar] - size), size)])
            size = min(size, 4)
        value = random.choice([None, 0, 1, random.randint(0, 15), random.randint(0, U64) % (1 << 8 * size)])
        return cls(bar, offset, size, None if value is None else value % (1 << 8 * size))

    def do(self, driver: VirtioDriver) -> int | None:
        """Make the access as a vCPU does; what was read."""
        where = driver.pci if self.bar is None else driver.pci.bars[self.bar]
        if self.value is None:
            return where.read(self.offset, self.size)
        where.write(self.offset, self.size, self.value)
        return None
