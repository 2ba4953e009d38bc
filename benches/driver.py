"""The in-process driver with a Python device: round trips of 16 bytes there and back, and what a test starts up in."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from measure import Report, arguments, interleaved

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.testing import Guest, Queue


class Echo(Device, id=63):
    """Echoes."""

    @queue(size=256)
    def echoq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.write(chain.read())
            chain.complete()


def round_trips(vq: Queue, requests: int, depth: int) -> None:
    """`depth` requests under way at a time: add them, kick once, wait for each."""
    for _ in range(requests // depth):
        buffers = [vq.add(b"sixteen bytes...", 16) for _ in range(depth)]
        vq.kick()
        for buffer in buffers:
            assert len(buffer.wait()) == 16


def timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def start_up() -> None:
    """All that a test needs before its first request, and what ends it."""
    with Guest(ioeventfd=True) as guest:
        guest.plug(Echo())


def drivers(stack: ExitStack) -> Iterator[tuple[str, Queue]]:
    for name, ioeventfd in (("sync", False), ("ioeventfd", True)):
        guest = stack.enter_context(Guest(ioeventfd=ioeventfd))
        yield name, guest.plug(Echo()).echoq


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=8192, help="in one repetition (default %(default)s)")
    args = parser.parse_args()
    report = Report(args.json)
    with ExitStack() as stack:
        queues = dict(drivers(stack))
        for title, unit, clock, scale in (
            ("round trips per second, in thousands", "1000/s", time.perf_counter, None),
            ("CPU of one round trip, all threads", "us", time.process_time, 1e6),
        ):
            modes: dict[str, Callable[[], float]] = {}
            for name, vq in queues.items():
                for depth in (1, 8, 64):
                    modes[f"{name}, depth {depth}"] = _mode(vq, args.requests, depth, clock, scale)
            report.add(title, unit, interleaved(modes, args.repetitions))
    report.add("start-up of a test", "ms", interleaved({"Guest, plug, close": _start_up}, args.repetitions))
    report.close()


def _mode(vq: Queue, requests: int, depth: int, clock: Callable[[], float], scale: float | None) -> Callable[[], float]:
    def measure() -> float:
        spent = timed(lambda: round_trips(vq, requests, depth), clock)
        return spent / requests * scale if scale else requests / spent / 1000

    return measure


def _start_up() -> float:
    return min(timed(start_up, time.perf_counter) for _ in range(5)) * 1000


if __name__ == "__main__":
    main()
