"""What a measurement asks of a back-end, and the figures of one."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

from pyvirtio.bench.process import Usage

PATTERNS = {
    "read": (0, False),
    "write": (100, False),
    "randread": (0, True),
    "randwrite": (100, True),
    "mixed": (50, True),
}
"""fio's words: how many of 100 requests write, and whether they go to random places."""

WARM_UP = 0.05
"""Seconds of load before each measurement: pages are touched, and busy waits are learnt."""


@dataclass(frozen=True)
class Load:
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


@dataclass(frozen=True)
class Sample:
    """One run at one depth; times are seconds. `cpu` is that of the back-end's process, if it is known, and `rss` the
    bytes of memory that were resident in it before and after.
    """

    iodepth: int
    requests: int
    errors: int
    seconds: float
    bytes: int
    p50: float
    p99: float
    p99_9: float
    max: float
    cpu: float | None
    rss: tuple[int, int] | None
    kicks: int
    interrupts: int

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


@dataclass(frozen=True)
class Spread:
    """A figure of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Self | None:
        """None if one of the values is not known."""
        found = list(values)
        known = [value for value in found if value is not None]
        if not known or len(known) < len(found):
            return None
        return cls(statistics.median(known), min(known), max(known))


def measured(
    run: Callable[..., dict[str, Any]],
    load: Load,
    iodepth: int,
    seconds: float,
    seed: int,
    usage: Callable[[], Usage | None],
) -> Sample:
    """Run the load for some seconds, after a moment that does not count; `usage` is that of the back-end so far."""
    how: dict[str, Any] = {"write_percent": load.write_percent, "random": load.random, "iodepth": iodepth}
    run(**how, seconds=WARM_UP, seed=seed)
    before = usage()
    figures = run(**how, seconds=seconds, seed=seed + 1)
    after = usage()
    requests = figures.pop("reads") + figures.pop("writes")
    return Sample(
        iodepth=iodepth,
        requests=requests,
        bytes=requests * load.block_size,
        cpu=None if before is None or after is None else after.cpu - before.cpu,
        rss=None if before is None or after is None else (before.rss, after.rss),
        **figures,
    )


def by_iodepth(samples: Iterable[Sample]) -> dict[int, list[Sample]]:
    """The samples of each depth, lowest first."""
    found: dict[int, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.iodepth):
        found.setdefault(sample.iodepth, []).append(sample)
    return found
