"""What the lint costs: round trips of a small request in process, without it (twice, to see the noise) and with it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from measure import Report, arguments, interleaved

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.testing import Guest
from pyvirtio.testing.ring import WRITE, Desc

BATCH = 64
ROUNDS = 40


class Echo(Device, id=4):
    """Completes what it gets."""

    @queue(size=BATCH)
    def requestq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.complete()


@contextmanager
def driven(lint: bool) -> Iterator["Driven"]:
    with Guest(ioeventfd=False, lint=lint) as guest:
        yield Driven(guest)


class Driven:
    """A device whose ring is full of one-descriptor chains; `serve` makes all of them available and has them served."""

    def __init__(self, guest: Guest) -> None:
        driver = guest.plug(Echo())
        self.vq = driver.function.dataplane.queues[0]
        self.ring = driver.requestq.ring
        for index in range(BATCH):
            self.ring.write_desc(index, Desc(0x8000, 16, WRITE))
            self.ring.write_avail(index, index)

    def microseconds(self) -> float:
        """Device time of one chain."""
        spent = 0.0
        for _ in range(ROUNDS):
            self.ring.next_avail = (self.ring.next_avail + BATCH) & 0xFFFF
            self.ring.publish()
            start = time.perf_counter()
            self.vq.service()
            spent += time.perf_counter() - start
        return spent / ROUNDS / BATCH * 1e6


def main() -> None:
    args = arguments(__doc__).parse_args()
    report = Report(args.json)
    with driven(False) as off, driven(False) as off_too, driven(True) as on:
        modes = {"off": off.microseconds, "off, once more": off_too.microseconds, "on": on.microseconds}
        report.add("a chain through a Python handler", "us", interleaved(modes, args.repetitions))
    report.close()


if __name__ == "__main__":
    main()
