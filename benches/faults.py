"""What faults cost: CPU time of a chain, for a device that was never asked for its faults, whose faults were switched
off again, and with a fault on that never hits. "off" has to be "never" within the spread."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from measure import Report, arguments, interleaved

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.backends.block import Null
from pyvirtio.devices.blk import Blk
from pyvirtio.faults import Lost
from pyvirtio.testing import Guest
from pyvirtio.testing.ring import NEXT, WRITE, Desc

BATCH = 64
HEADER, DATA, STATUS = 0x8000, 0x9000, 0xA000
MODES = ("never", "off", "on, chance 0")


class Echo(Device, id=4):
    """Completes what it gets."""

    @queue(size=256)
    def requestq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.complete()


class Driven:
    """A device with `BATCH` requests of three descriptors in its ring, served again and again."""

    def __init__(self, guest: Guest, device: Device, mode: str) -> None:
        driver = guest.plug(device)
        if mode != "never":
            device.faults.add(Lost(chance=0), seed=1)
        if mode == "off":
            device.faults.clear()
        self.vq = driver.function.dataplane.queues[0]
        self.ring = driver.requestq.ring
        driver.memory.write(HEADER, bytes(16))
        for request in range(BATCH):
            first = 3 * request
            self.ring.write_desc(first, Desc(HEADER, 16, NEXT, first + 1))
            self.ring.write_desc(first + 1, Desc(DATA, 4096, WRITE | NEXT, first + 2))
            self.ring.write_desc(first + 2, Desc(STATUS, 1, WRITE))
        self.requests = 0

    def measure(self, rounds: int) -> float:
        """Microseconds of a chain."""
        spent = 0
        for _ in range(rounds):
            for request in range(BATCH):
                self.ring.offer(3 * request)
            self.ring.publish()
            start = time.thread_time_ns()
            self.vq.service()
            spent += time.thread_time_ns() - start
        return spent / rounds / BATCH / 1000


@contextmanager
def driven(make: Callable[[], Device]) -> Iterator[dict[str, Driven]]:
    with ExitStack() as stack:
        guests = {mode: stack.enter_context(Guest(ioeventfd=False)) for mode in MODES}
        yield {mode: Driven(guest, make(), mode) for mode, guest in guests.items()}


def main() -> None:
    parser = arguments(__doc__, repetitions=15)
    parser.add_argument("--rounds", type=int, default=200, help="batches in one repetition (default %(default)s)")
    args = parser.parse_args()
    report = Report(args.json)
    devices: dict[str, Callable[[], Device]] = {
        "a Python device that completes": Echo,
        "the native block plane, null disk": lambda: Blk(Null(1 << 30)),
    }
    for name, make in devices.items():
        with driven(make) as devices_of:
            modes = {mode: lambda d=d: d.measure(args.rounds) for mode, d in devices_of.items()}
            report.add(f"{name}: CPU of one chain", "us", interleaved(modes, args.repetitions))
    report.close()


if __name__ == "__main__":
    main()
