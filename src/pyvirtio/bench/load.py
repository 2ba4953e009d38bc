"""What a measurement asks of a disk, and the figures of one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyvirtio.bench.process import Usage
from pyvirtio.bench.sample import WARM_UP, Figure, Sample, costed
from pyvirtio.properties import show_size

PATTERNS = {
    "read": (0, False),
    "write": (100, False),
    "randread": (0, True),
    "randwrite": (100, True),
    "mixed": (50, True),
}
"""fio's words: how many of 100 requests write, and whether they go to random places."""
MIB = 1 << 20
MICRO = 1e6


@dataclass(frozen=True)
class DiskLoad:
    """`size` is how much of the disk is used, from its beginning; sizes are bytes.

    Completions are looked for all the time with `poll`; else the driver sleeps until an interrupt, as a guest does.
    """

    rw: str = "randread"
    block_size: int = 4096
    num_queues: int = 1
    size: int = 1 << 28
    packed: bool = False
    indirect: bool = False
    poll: bool = False
    verify: bool = False

    @property
    def write_percent(self) -> int:
        return PATTERNS[self.rw][0]

    @property
    def random(self) -> bool:
        return PATTERNS[self.rw][1]

    varies = ("iodepth", "depth")
    compared = ("iops", "cpu_per_request", "p50")
    drawn = (("iops",), ("p50", "p99"))
    units = "Latencies and the back-end's CPU time for a request in microseconds."

    @property
    def figures(self) -> Mapping[str, Figure]:
        return {
            "iops": Figure("requests/s", "requests per second"),
            "bandwidth": Figure("MiB/s", "MiB per second", factor=1 / MIB),
            "p50": Figure("p50", "p50 in microseconds", factor=MICRO),
            "p99": Figure("p99", "p99 in microseconds", factor=MICRO),
            "p99_9": Figure("p99.9", "p99.9 in microseconds", factor=MICRO),
            "cpu_per_request": Figure("CPU", "CPU time per request in microseconds", "{:.2f}", MICRO),
        }

    def describe(self) -> str:
        descriptors = "indirect" if self.indirect else "direct"
        queues = "1 queue" if self.num_queues == 1 else f"{self.num_queues} queues"
        how = f"{ring_in_words(self.packed)}, {descriptors} descriptors, {looks_in_words(self.poll, self.verify)}"
        return f"{self.rw} of {show_size(self.block_size)}, {queues}, {how}."


def ring_in_words(packed: bool) -> str:
    return f"{'packed' if packed else 'split'} ring"


def looks_in_words(poll: bool, verify: bool) -> str:
    return f"{'polled' if poll else 'interrupts'}{', verified' if verify else ''}"


@dataclass(frozen=True)
class DiskSample(Sample):
    """One run at one depth."""

    iodepth: int
    requests: int
    errors: int
    bytes: int
    p50: float
    p99: float
    p99_9: float
    max: float

    @property
    def failed(self) -> int:
        """How much went wrong."""
        return self.errors

    @property
    def iops(self) -> float:
        return self.requests / self.seconds

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds

    @property
    def cpu_per_request(self) -> float | None:
        return None if self.cpu is None else self.cpu / self.requests


def measured(
    run: Callable[..., dict[str, Any]],
    load: DiskLoad,
    iodepth: int,
    seconds: float,
    round_: int,
    usage: Callable[[], Usage | None],
) -> DiskSample:
    """Run the load for some seconds, after a moment that does not count; `usage` is that of the back-end so far."""
    how: dict[str, Any] = {"write_percent": load.write_percent, "random": load.random, "iodepth": iodepth}
    run(**how, seconds=WARM_UP, seed=2 * round_ + 1)
    figures = costed(lambda: run(**how, seconds=seconds, seed=2 * round_ + 2), usage)
    requests = figures.pop("reads") + figures.pop("writes")
    return DiskSample(iodepth=iodepth, requests=requests, bytes=requests * load.block_size, **figures)
