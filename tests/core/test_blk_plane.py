"""When the answers of the blk plane become known to the driver."""

import struct
import time

from pyvirtio._core import BlkPlane, DeviceState, GuestMemory, VirtQueue
from pyvirtio.backends.block import BlockBackend

DESC, AVAIL, USED, BUFFERS = 0x1000, 0x2000, 0x3000, 0x4000
SECTOR = 512
REQUESTS = 3


class Watching(BlockBackend):
    """Takes `seconds` for a request, and notes how many are known to be used when the next one comes."""

    capacity = 1 << 20

    def __init__(self, memory: GuestMemory, seconds: float) -> None:
        self.memory = memory
        self.seconds = seconds
        self.used: list[int] = []

    def pread(self, length: int, offset: int) -> bytes:
        self.used.append(self.memory.load16(USED + 2))
        time.sleep(self.seconds)
        return bytes(length)


def used_while_reading(seconds: float) -> list[int]:
    """Serve a batch of read requests."""
    memory = GuestMemory.allocate([(0, 1 << 20)])
    backend = Watching(memory, seconds)
    vq = VirtQueue(DeviceState("blk0", str), "requestq", 0, 8)
    vq.start(memory, BlkPlane(backend, capacity=backend.capacity), size=8, desc=DESC, avail=AVAIL, used=USED)
    for request in range(REQUESTS):
        head, header = 2 * request, BUFFERS + 1024 * request
        memory.write(header, struct.pack("<IIQ", 0, 0, request))
        descs = struct.pack("<QIHHQIHH", header, 16, 1, head + 1, header + 16, SECTOR + 1, 2, 0)
        memory.write(DESC + 16 * head, descs)
        memory.store16(AVAIL + 4 + 2 * request, head)
    memory.store16(AVAIL + 2, REQUESTS)
    vq.notify()
    vq.stop()
    assert memory.load16(USED + 2) == REQUESTS
    return backend.used


def test_a_slow_request_does_not_wait_for_the_rest_of_its_batch() -> None:
    assert used_while_reading(seconds=0.002) == [0, 1, 2]
