"""Our back-ends and another one under the same loads, in turn, and the ratios of what they did."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyvirtio.bench.load import Load, Sample, Spread
from pyvirtio.bench.nbd import NbdTarget
from pyvirtio.bench.servers import MEMORY, NATIVE, NBDKIT, PYTHON, Storage, command, started
from pyvirtio.bench.target import Target

FIGURES = ("iops", "cpu_per_request", "p50")


@dataclass(frozen=True)
class Contest:
    """One storage under loads of several depths, served by all of the servers."""

    storage: Storage
    load: Load
    iodepths: tuple[int, ...]

    @property
    def ours(self) -> tuple[str, ...]:
        """What a method in Python gets need not be aligned, as O_DIRECT wants it; and a RAM disk is for Python only."""
        if self.storage.name == MEMORY:
            return (PYTHON,)
        return (NATIVE,) if self.storage.direct else (NATIVE, PYTHON)

    def samples(self, rounds: int) -> int:
        """How many measurements there will be."""
        return rounds * len(self.iodepths) * (1 + len(self.ours))


@dataclass(frozen=True)
class Result:
    """What a server did in one round of a contest."""

    storage: str
    server: str
    round: int
    sample: Sample


@dataclass(frozen=True)
class Row:
    """One of our servers against the other at one depth: figures of both, and their ratios round by round."""

    storage: str
    iodepth: int
    server: str
    ours: dict[str, Spread | None]
    theirs: dict[str, Spread | None]
    ratios: dict[str, Spread | None]


def run(contests: list[Contest], other: str, rounds: int, seconds: float, directory: Path) -> Iterator[Result]:
    """One contest after the other. Sockets are in `directory`."""
    for contest in contests:
        yield from _run(contest, other, rounds, seconds, directory)


def _run(contest: Contest, other: str, rounds: int, seconds: float, directory: Path) -> Iterator[Result]:
    """Measure each server at each depth, in every round; they all run throughout, and wait while another is loaded."""
    with ExitStack() as stack:
        targets = {name: _connected(contest, name, directory, stack) for name in (other, *contest.ours)}
        for round_ in range(rounds):
            for iodepth in contest.iodepths:
                for name, target in targets.items():
                    sample = target.measure(iodepth, seconds, seed=2 * round_ + 1)
                    yield Result(contest.storage.name, name, round_, sample)
        for target in targets.values():
            target.check()


def _connected(contest: Contest, server: str, directory: Path, stack: ExitStack) -> Target | NbdTarget:
    path = directory / f"{contest.storage.name}-{server}.sock"
    storage = contest.storage.of(server)
    stack.enter_context(storage.made(contest.load.size))
    arguments = command(server, storage, contest.load.num_queues, path)
    pid = stack.enter_context(started(arguments, path))
    if server == NBDKIT:
        return stack.enter_context(NbdTarget(path, contest.load, pid))
    return stack.enter_context(Target(path, contest.load, max(contest.iodepths), pid))


def rows(results: Iterable[Result], other: str) -> list[Row]:
    """A row for each storage, depth and server of ours, in the order in which they were measured."""
    results = list(results)
    keys = dict.fromkeys((r.storage, r.sample.iodepth, r.server) for r in results if r.server != other)
    return [_row(results, storage, iodepth, server, other) for storage, iodepth, server in keys]


def _row(results: list[Result], storage: str, iodepth: int, server: str, other: str) -> Row:
    def samples(name: str) -> list[Sample]:
        found = [r for r in results if (r.storage, r.server, r.sample.iodepth) == (storage, name, iodepth)]
        return [r.sample for r in sorted(found, key=lambda r: r.round)]

    ours, theirs = samples(server), samples(other)

    def spreads(of: Callable[[str], Iterable[float | None]]) -> dict[str, Spread | None]:
        return {name: Spread.of(of(name)) for name in FIGURES}

    return Row(
        storage,
        iodepth,
        server,
        spreads(lambda name: [getattr(sample, name) for sample in ours]),
        spreads(lambda name: [getattr(sample, name) for sample in theirs]),
        spreads(lambda name: [_ratio(getattr(a, name), getattr(b, name)) for a, b in zip(ours, theirs, strict=True)]),
    )


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def as_json(other: str, contests: list[Contest], results: list[Result]) -> dict[str, Any]:
    return {
        "against": other,
        "loads": {contest.storage.name: asdict(contest.load) for contest in contests},
        "rows": [asdict(row) for row in rows(results, other)],
        "results": [asdict(result) for result in results],
    }
