"""Random chains, sound or not, in a ring of either kind; `chaos` draws them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from pyvirtio.testing.packed import DESC_SIZE, PackedRing
from pyvirtio.testing.queue import Queue
from pyvirtio.testing.ring import INDIRECT, NEXT, Desc, SplitRing, linked

if TYPE_CHECKING:
    from pyvirtio.testing.chaos import Batch, Chain, Mutation

LIMITS = {"address": 2**64, "length": 2**32, "flags": 2**16, "next": 2**16}
PACKED_DESC = struct.Struct("<QIHH")


def split(vq: Queue, ring: SplitRing, batch: Batch) -> None:
    """Write a batch into the table of a split ring, and its heads behind those that are available."""
    free = [index for index in batch.order if index < ring.size]
    written, heads = list[int](), list[int]()
    for chain in batch.chains:
        needed = 1 if chain.table else len(chain.buffers)
        if len(chain.buffers) <= ring.size and needed <= len(free):
            indexes = [free.pop() for _ in range(needed)]
            written += _write(vq, ring, chain, indexes)
            heads.append(indexes[0])
    for mutation in batch.mutations:
        _mutate(vq, written, heads, mutation)
    for head in heads:
        ring.offer(head)


def _write(vq: Queue, ring: SplitRing, chain: Chain, indexes: list[int]) -> list[int]:
    """Put a chain into the ring's table, or its own; the addresses of its descriptors."""
    if chain.table is not None:
        ring.write_desc(indexes[0], Desc(chain.table, 16 * len(chain.buffers), INDIRECT))
        inner = _write_table(vq, chain.table, list(range(len(chain.buffers))), chain.buffers)
        return [*inner, ring.desc + 16 * indexes[0]]
    return _write_table(vq, ring.desc, indexes, chain.buffers)


def _write_table(vq: Queue, table: int, indexes: list[int], descs: list[Desc]) -> list[int]:
    for index, desc in zip(indexes, linked(descs, indexes), strict=True):
        vq.memory.write(table + 16 * index, desc.pack())
    return [table + 16 * index for index in indexes]


def _mutate(vq: Queue, written: list[int], heads: list[int], mutation: Mutation) -> None:
    place, which, value = mutation.place, mutation.which, mutation.value
    if place == "jump":
        heads.extend([heads[0] if heads else 0] * value)
    elif place == "head" and heads:
        heads[which % len(heads)] = value
    elif place in LIMITS and written:
        at = written[which % len(written)]
        desc = Desc.unpack(vq.memory.read(at, 16))
        vq.memory.write(at, desc._replace(**{place: value % LIMITS[place]}).pack())


def packed(vq: Queue, ring: PackedRing, batch: Batch) -> None:
    """Write a batch into a packed ring from `next_avail` on; its first descriptor stays unavailable until `publish`."""
    first, at, room = ring.next_avail, ring.next_avail, ring.size
    ids = [index for index in batch.order if index < ring.size]
    written: list[tuple[int, int]] = []
    for chain in batch.chains:
        descs = chain.buffers if chain.table is None else [Desc(chain.table, 16 * len(chain.buffers), INDIRECT)]
        if len(descs) > room:
            break
        if chain.table is not None:
            vq.memory.write(chain.table, ring.table(chain.buffers))
            written += [(chain.table, index) for index in range(len(chain.buffers))]
        room, id_ = room - len(descs), ids.pop()
        for n, desc in enumerate(descs):
            flags = desc.flags | (NEXT if n < len(descs) - 1 else 0) | at.available
            if at == first:
                ring.withheld.append((at.index, flags))
            _put(vq, ring.desc, at.index, desc._replace(flags=0 if at == first else flags, next=id_))
            written.append((ring.desc, at.index))
            at = at.after(1, ring.size)
    for mutation in batch.mutations if written else []:
        _mutate_packed(vq, ring, written, mutation)
    ring.next_avail = at


def _put(vq: Queue, table: int, index: int, desc: Desc) -> None:
    data = PACKED_DESC.pack(desc.address, desc.length, desc.next, desc.flags)
    vq.memory.write(table + DESC_SIZE * index, data)


def _mutate_packed(vq: Queue, ring: PackedRing, written: list[tuple[int, int]], mutation: Mutation) -> None:
    if mutation.place not in LIMITS:
        return
    table, index = written[mutation.which % len(written)]
    value = mutation.value % LIMITS[mutation.place]
    address, length, id_, flags = PACKED_DESC.unpack(vq.memory.read(table + DESC_SIZE * index, DESC_SIZE))
    withheld = table == ring.desc and ring.withheld[-1][0] == index
    if mutation.place == "flags":
        if value < 8:
            value |= (ring.withheld[-1][1] if withheld else flags) & ~7  # another kind of descriptor in the same lap
        if withheld:
            ring.withheld[-1] = (index, value)
            return
    _put(vq, table, index, Desc(address, length, flags, id_)._replace(**{mutation.place: value}))
