"""The in-process driver of `pyvirtio.testing`: how long a test takes to start, and how fast requests go round."""

import time

from measure import Report, arguments, interleaved

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.testing import Guest, VirtioDriver

ROUND_TRIPS = 12_800


class Echo(Device, id=4):
    """Says one byte to whoever asks."""

    @queue(size=64)
    def requestq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.write(b"x")
            chain.complete()


def start_up(ioeventfd: bool) -> float:
    """Milliseconds until a device in a machine of its own is up, and gone again."""
    start = time.perf_counter()
    with Guest(ioeventfd=ioeventfd) as guest:
        guest.plug(Echo())
    return (time.perf_counter() - start) * 1e3


def round_trips(driver: VirtioDriver, depth: int) -> float:
    """Thousands in a second, `depth` at a time."""
    vq = driver.requestq
    start = time.perf_counter()
    for _ in range(ROUND_TRIPS // depth):
        buffers = [vq.add(writable=1) for _ in range(depth)]
        vq.kick()
        for buffer in buffers:
            buffer.wait()
    return ROUND_TRIPS / (time.perf_counter() - start) / 1e3


def main() -> None:
    args = arguments(__doc__).parse_args()
    report = Report(args.json)
    starts = {"synchronous": lambda: start_up(False), "ioeventfd": lambda: start_up(True)}
    report.add("start-up of a test", "ms", interleaved(starts, args.repetitions))
    with Guest(ioeventfd=False) as sync, Guest(ioeventfd=True) as ioeventfd:
        drivers = {"synchronous": sync.plug(Echo()), "ioeventfd": ioeventfd.plug(Echo())}
        modes = {
            f"{name}, {depth} at a time": (lambda driver=driver, depth=depth: round_trips(driver, depth))
            for name, driver in drivers.items()
            for depth in (1, 64)
        }
        report.add("round trips of a request", "thousands in a second", interleaved(modes, args.repetitions))
    report.close()


if __name__ == "__main__":
    main()
