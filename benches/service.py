"""CPU time of a chain through `VirtQueue.service`: ring, handler, used ring, interrupt decision; no kick, no guest.

The driver's side is one store for each batch, so that nearly all that is measured is the device's side.
"""

import os
import struct
import time
from collections.abc import Callable

from measure import Report, arguments, interleaved

from pyvirtio._core import BlkPlane, DeviceState, GuestMemory, VirtQueue
from pyvirtio.backends.block import BlockBackend
from pyvirtio.dataplane import QueueSetup, start_ring
from pyvirtio.device import Handler
from pyvirtio.spec import Feature

SIZE = 256
REQUESTS = SIZE // 4
DESC, AVAIL, USED = 0x1000, 0x3000, 0x4000
HEADERS, STATUSES, TABLES, DATA = 0x10000, 0x18000, 0x20000, 0x100000
BLOCK = 4096
NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = 1
READ_REQUEST, WRITE_REQUEST, ID_REQUEST = 0, 1, 8
CAPACITY = 1 << 30


class Null(BlockBackend):
    """A disk that does nothing, in Python: what is left is the cost of calling it."""

    capacity = CAPACITY

    def preadv(self, buffers: list[memoryview], offset: int) -> None:
        pass


class NullCopied(BlockBackend):
    """The same through `pread`, whose bytes are copied into the guest."""

    capacity = CAPACITY
    zeroes = bytes(BLOCK)

    def pread(self, length: int, offset: int) -> bytes:
        return self.zeroes


def complete_all(vq: VirtQueue) -> None:
    for chain in vq:
        chain.complete()


def answer_all(vq: VirtQueue) -> None:
    for chain in vq:
        chain.read(16)
        chain.write(b"\0")
        chain.complete()


def request(entry: int, kind: int, memory: GuestMemory) -> list[tuple[int, int, int]]:
    """A block request of 4 KiB: address, length and flags of its descriptors."""
    header, status, data = HEADERS + 16 * entry, STATUSES + entry, DATA + BLOCK * entry
    memory.write(header, struct.pack("<IIQ", kind, 0, 8 * entry))
    return [(header, 16, 0), (data, BLOCK, 0 if kind == WRITE_REQUEST else WRITE), (status, 1, WRITE)]


class SplitRing:
    """A started queue with a block request in each entry; `serve` makes a batch available and serves it.

    With `anew` the descriptors of a batch are written each time, as drivers do and a packed ring needs.
    """

    def __init__(
        self, handler: Handler, kind: int = READ_REQUEST, *, indirect: bool = False, anew: bool = False
    ) -> None:
        self.memory = GuestMemory.allocate([(0, 8 << 20)])
        self.vq = VirtQueue(DeviceState("bench", print), "requestq", 0, SIZE)
        for entry in range(REQUESTS):
            self._place(entry, request(entry, kind, self.memory), indirect)
        for entry in range(SIZE):
            self.memory.store16(AVAIL + 4 + 2 * entry, entry % REQUESTS * 4)
        self.memory.store16(AVAIL, NO_INTERRUPT)
        self.vq.start(self.memory, handler, size=SIZE, desc=DESC, avail=AVAIL, used=USED, indirect=indirect)
        self.table = self.memory.read(DESC, 16 * SIZE) if anew else b""
        self.available = 0

    def _place(self, entry: int, descs: list[tuple[int, int, int]], indirect: bool) -> None:
        first = 0 if indirect else 4 * entry
        last = len(descs) - 1
        linked = [(*desc[:2], desc[2] | (NEXT if n < last else 0), first + n + 1) for n, desc in enumerate(descs)]
        table = b"".join(struct.pack("<QIHH", *desc) for desc in linked)
        if indirect:
            self.memory.write(TABLES + 64 * entry, table)
            table = struct.pack("<QIHH", TABLES + 64 * entry, len(table), INDIRECT, 0)
        self.memory.write(DESC + 64 * entry, table)

    def serve(self, batch: int) -> None:
        if self.table:
            start = self.available % REQUESTS * 64
            self.memory.write(DESC + start, self.table[start : start + 64 * batch])
        self.available = self.available + batch & 0xFFFF
        self.memory.store16(AVAIL + 2, self.available)
        self.vq.service()


class PackedRing:
    """The same with a packed ring of just these requests. The driver writes the descriptors of a batch at once."""

    def __init__(self, handler: Handler, kind: int = READ_REQUEST, *, indirect: bool = False) -> None:
        self.memory = GuestMemory.allocate([(0, 8 << 20)])
        self.vq = VirtQueue(DeviceState("bench", print), "requestq", 0, SIZE)
        chains = [self._chain(entry, request(entry, kind, self.memory), indirect) for entry in range(REQUESTS)]
        self.per_chain = 16 * len(chains[0])
        self.laps = [
            b"".join(struct.pack("<QIHH", *desc[:3], desc[3] | lap) for chain in chains for desc in chain)
            for lap in (1 << 7, 1 << 15)
        ]
        self.memory.store16(AVAIL + 2, NO_INTERRUPT)
        size = REQUESTS * len(chains[0])
        setup = QueueSetup(size, DESC, AVAIL, USED)
        features = Feature.RING_PACKED | Feature.INDIRECT_DESC
        start_ring(self.vq, self.memory, handler, setup, features, legacy=False, at=None)
        self.available = 0

    def _chain(self, entry: int, descs: list[tuple[int, int, int]], indirect: bool) -> list[tuple[int, int, int, int]]:
        """Address, length, buffer id and flags of the descriptors in the ring."""
        if not indirect:
            last = len(descs) - 1
            return [(at, size, entry, flags | (NEXT if n < last else 0)) for n, (at, size, flags) in enumerate(descs)]
        table = b"".join(struct.pack("<QIHH", at, size, 0, flags) for at, size, flags in descs)
        self.memory.write(TABLES + 64 * entry, table)
        return [(TABLES + 64 * entry, len(table), entry, INDIRECT)]

    def serve(self, batch: int) -> None:
        while batch:
            lap, entry = divmod(self.available, REQUESTS)
            count = min(batch, REQUESTS - entry)
            start = entry * self.per_chain
            self.memory.write(DESC + start, self.laps[lap][start : start + count * self.per_chain])
            self.available = (self.available + count) % (2 * REQUESTS)
            batch -= count
        self.vq.service()


Rings = dict[str, SplitRing | PackedRing]


def per_chain(ring: SplitRing | PackedRing, batch: int, chains: int) -> Callable[[], float]:
    def measure() -> float:
        batches = max(1, chains // batch)
        before = ring.vq.counters["chains"]
        start = time.thread_time_ns()
        for _ in range(batches):
            ring.serve(batch)
        spent = time.thread_time_ns() - start
        served = ring.vq.counters["chains"] - before
        assert served == batches * batch, f"{served} of {batches * batch} chains were served"
        return spent / served / 1000

    return measure


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--chains", type=int, default=64000, help="in one repetition (default %(default)s)")
    parser.add_argument("--depth", type=int, default=32, help="chains of a batch (default %(default)s)")
    args = parser.parse_args()
    sink, zeroes = os.open("/dev/null", os.O_RDWR), os.open("/dev/zero", os.O_RDWR)
    rings: Rings = {
        "blk plane, native: GET_ID, no call of the host": SplitRing(BlkPlane(sink, capacity=CAPACITY), ID_REQUEST),
        "blk plane, native: write to /dev/null": SplitRing(BlkPlane(sink, capacity=CAPACITY), WRITE_REQUEST),
        "blk plane, native: read of /dev/zero": SplitRing(BlkPlane(zeroes, capacity=CAPACITY)),
        "blk plane, Python preadv that does nothing": SplitRing(BlkPlane(Null(), capacity=CAPACITY)),
        "blk plane, Python pread of 4 KiB": SplitRing(BlkPlane(NullCopied(), capacity=CAPACITY)),
        "Python handler: complete": SplitRing(complete_all),
        "Python handler: read, write, complete": SplitRing(answer_all),
    }
    plane = BlkPlane(sink, capacity=CAPACITY)
    kinds: Rings = {
        "split ring, direct": SplitRing(plane, ID_REQUEST, anew=True),
        "split ring, indirect": SplitRing(plane, ID_REQUEST, indirect=True, anew=True),
        "packed ring, direct": PackedRing(plane, ID_REQUEST),
        "packed ring, indirect": PackedRing(plane, ID_REQUEST, indirect=True),
    }
    report = Report(args.json)
    for depth in (args.depth, 1):
        chains = args.chains if depth > 1 else args.chains // 8
        modes = {name: per_chain(ring, depth, chains) for name, ring in rings.items()}
        samples = interleaved(modes, args.repetitions)
        report.add(f"CPU of one chain with 4 KiB, {depth} for each service", "us", samples)
        modes = {name: per_chain(ring, depth, chains) for name, ring in kinds.items()}
        report.add(f"CPU of one GET_ID, {depth} for each service", "us", interleaved(modes, args.repetitions))
    report.close()


if __name__ == "__main__":
    main()
