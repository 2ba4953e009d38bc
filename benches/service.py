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

SIZE = 256
DESC, AVAIL, USED = 0x1000, 0x3000, 0x4000
HEADERS, STATUSES, DATA = 0x10000, 0x18000, 0x100000
BLOCK = 4096
NEXT, WRITE = 1, 2
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


class Ring:
    """A started queue with a 4 KiB block request in each entry; `serve` makes a batch available and serves it."""

    def __init__(self, handler: Callable[[VirtQueue], object] | BlkPlane, request: int = READ_REQUEST) -> None:
        self.memory = GuestMemory.allocate([(0, 8 << 20)])
        state = DeviceState("bench", print)
        self.vq = VirtQueue(state, "requestq", 0, SIZE)
        for entry in range(SIZE // 4):
            self._write_request(entry, request)
        for entry in range(SIZE):
            self.memory.store16(AVAIL + 4 + 2 * entry, entry % (SIZE // 4) * 4)
        self.memory.store16(AVAIL, NO_INTERRUPT)
        self.vq.start(self.memory, handler, size=SIZE, desc=DESC, avail=AVAIL, used=USED)
        self.available = 0

    def _write_request(self, entry: int, request: int) -> None:
        header, status, data = HEADERS + 16 * entry, STATUSES + entry, DATA + BLOCK * entry
        first = 4 * entry
        descs = [
            (header, 16, NEXT, first + 1),
            (data, BLOCK, NEXT | (0 if request == WRITE_REQUEST else WRITE), first + 2),
            (status, 1, WRITE, 0),
        ]
        self.memory.write(header, struct.pack("<IIQ", request, 0, 8 * entry))
        self.memory.write(DESC + 16 * first, b"".join(struct.pack("<QIHH", *desc) for desc in descs))

    def serve(self, batch: int) -> None:
        self.available = self.available + batch & 0xFFFF
        self.memory.store16(AVAIL + 2, self.available)
        self.vq.service()


def per_chain(ring: Ring, batch: int, chains: int) -> Callable[[], float]:
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
    rings = {
        "blk plane, native: GET_ID, no call of the host": Ring(BlkPlane(sink, capacity=CAPACITY), ID_REQUEST),
        "blk plane, native: write to /dev/null": Ring(BlkPlane(sink, capacity=CAPACITY), WRITE_REQUEST),
        "blk plane, native: read of /dev/zero": Ring(BlkPlane(zeroes, capacity=CAPACITY)),
        "blk plane, Python preadv that does nothing": Ring(BlkPlane(Null(), capacity=CAPACITY)),
        "blk plane, Python pread of 4 KiB": Ring(BlkPlane(NullCopied(), capacity=CAPACITY)),
        "Python handler: complete": Ring(complete_all),
        "Python handler: read, write, complete": Ring(answer_all),
    }
    report = Report(args.json)
    for depth in (args.depth, 1):
        chains = args.chains if depth > 1 else args.chains // 8
        modes = {name: per_chain(ring, depth, chains) for name, ring in rings.items()}
        samples = interleaved(modes, args.repetitions)
        report.add(f"CPU of one chain with 4 KiB, {depth} for each service", "us", samples)
    report.close()


if __name__ == "__main__":
    main()
