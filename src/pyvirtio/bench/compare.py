"""Our back-ends and another one under the same loads, in turn, and the ratios of what they did."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from pyvirtio.bench.sample import Load, Sample, Spread


class Target(Protocol):
    """A back-end under load."""

    @property
    def pids(self) -> set[int]:
        """Its processes."""

    def measure(self, at: int, seconds: float, round_: int = 0, /) -> Any: ...
    def check(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


class Contest(Protocol):
    """One thing that all of the servers can do, in loads that vary in one thing."""

    @property
    def name(self) -> str: ...

    @property
    def load(self) -> Load: ...

    @property
    def points(self) -> tuple[int, ...]:
        """The depths, or what else varies."""

    @property
    def ours(self) -> tuple[str, ...]:
        """Those of our servers that take part."""

    def connected(self, server: str, directory: Path, stack: ExitStack) -> Target:
        """Start a server, and prepare it for the loads. Sockets are in `directory`."""


@dataclass(frozen=True)
class Result:
    """What a server did in one round of a contest."""

    contest: str
    server: str
    round: int
    at: int
    sample: Any


@dataclass(frozen=True)
class Row:
    """One of our servers against the other at one point: figures of both, and their ratios round by round."""

    contest: str
    at: int
    server: str
    ours: dict[str, Spread | None]
    theirs: dict[str, Spread | None]
    ratios: dict[str, Spread | None]


def count(contest: Contest, rounds: int) -> int:
    """How many measurements there will be."""
    return rounds * len(contest.points) * (1 + len(contest.ours))


def run(contests: Iterable[Contest], other: str, rounds: int, seconds: float, directory: Path) -> Iterator[Result]:
    """One contest after the other."""
    for contest in contests:
        yield from _run(contest, other, rounds, seconds, directory)


def _run(contest: Contest, other: str, rounds: int, seconds: float, directory: Path) -> Iterator[Result]:
    """Measure each server at each point, in every round; they wait while another is loaded."""
    with ExitStack() as stack:
        targets = {name: contest.connected(name, directory, stack) for name in (other, *contest.ours)}
        for round_ in range(rounds):
            for at in contest.points:
                for name, target in targets.items():
                    with _stopped(each for each in targets.values() if each is not target):
                        sample = target.measure(at, seconds, round_)
                    yield Result(contest.name, name, round_, at, sample)
        for target in targets.values():
            target.check()


@contextmanager
def _stopped(targets: Iterable[Target]) -> Iterator[None]:
    """Some servers look for work all the time, on a CPU that another is to have."""
    pids = [pid for target in targets for pid in target.pids]
    with ExitStack() as stack:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            stack.callback(os.kill, pid, signal.SIGCONT)
        yield


def rows(results: Iterable[Result], other: str, compared: tuple[str, ...]) -> list[Row]:
    """A row for each contest, point and server of ours, in the order in which they were measured."""
    results = list(results)
    keys = dict.fromkeys((r.contest, r.at, r.server) for r in results if r.server != other)
    return [_row(results, compared, *key, other) for key in keys]


def _row(results: list[Result], compared: tuple[str, ...], contest: str, at: int, server: str, other: str) -> Row:
    def samples(name: str) -> list[Sample]:
        found = [r for r in results if (r.contest, r.server, r.at) == (contest, name, at)]
        return [r.sample for r in sorted(found, key=lambda r: r.round)]

    ours, theirs = samples(server), samples(other)

    def spreads(of: Callable[[str], Iterable[float | None]]) -> dict[str, Spread | None]:
        return {name: Spread.of(of(name)) for name in compared}

    return Row(
        contest,
        at,
        server,
        spreads(lambda name: [getattr(sample, name) for sample in ours]),
        spreads(lambda name: [getattr(sample, name) for sample in theirs]),
        spreads(lambda name: [_ratio(getattr(a, name), getattr(b, name)) for a, b in zip(ours, theirs, strict=True)]),
    )


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None


def as_json(other: str, contests: list[Contest], results: list[Result], rows: list[Row]) -> dict[str, Any]:
    varies, _ = contests[0].load.varies
    return {
        "against": other,
        "loads": {contest.name: asdict(contest.load) for contest in contests},  # type: ignore[call-overload]
        "rows": [_named(asdict(row), varies) for row in rows],
        "results": [_named(asdict(result), varies) for result in results],
    }


def _named(figures: dict[str, Any], varies: str) -> dict[str, Any]:
    """What varies goes by its name."""
    return {varies if key == "at" else key: value for key, value in figures.items()}
