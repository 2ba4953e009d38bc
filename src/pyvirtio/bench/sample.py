"""What all measurements have in common: their cost, their spread, and how figures are shown."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

from pyvirtio.bench.process import Usage

WARM_UP = 0.05
"""Seconds of load before each measurement: pages are touched, and busy waits are learnt."""
NOT_KNOWN = "-"


@dataclass(frozen=True)
class Sample:
    """One run; times are seconds. `cpu` is that of the back-end's process, if it is known, and `rss` the bytes of
    memory that were resident in it before and after.
    """

    seconds: float
    cpu: float | None
    rss: tuple[int, int] | None
    kicks: int
    interrupts: int


def costed(run: Callable[[], dict[str, Any]], usage: Callable[[], Usage | None]) -> dict[str, Any]:
    """The figures of a run, with `cpu` and `rss`; `usage` is that of the back-end so far."""
    before = usage()
    figures = run()
    after = usage()
    if before is None or after is None:
        return figures | {"cpu": None, "rss": None}
    return figures | {"cpu": after.cpu - before.cpu, "rss": (before.rss, after.rss)}


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


@dataclass(frozen=True)
class Figure:
    """How a figure is shown: its title in tables, its name in words, its format, and what it is multiplied by."""

    title: str
    words: str
    form: str = "{:,.0f}"
    factor: float = 1

    def median(self, spread: Spread | None) -> str:
        return NOT_KNOWN if spread is None else self.form.format(spread.median * self.factor)

    def spread(self, spread: Spread | None) -> str:
        if spread is None:
            return NOT_KNOWN
        middle, low, high = (
            self.form.format(value * self.factor) for value in (spread.median, spread.low, spread.high)
        )
        return f"{middle} ({low}-{high})"


class Load(Protocol):
    """What is asked of a back-end; one thing in it varies from sample to sample."""

    @property
    def varies(self) -> tuple[str, str]:
        """The attribute of samples that says it, and its title."""

    @property
    def figures(self) -> Mapping[str, Figure]:
        """The attributes of samples that are shown, the most important one first."""

    @property
    def compared(self) -> tuple[str, ...]:
        """Those of which ratios are made."""

    @property
    def drawn(self) -> tuple[tuple[str, ...], ...]:
        """Those that are drawn, in panels."""

    @property
    def units(self) -> str:
        """A sentence about them."""

    def describe(self) -> str:
        """The load in words."""


def spread_of(samples: Iterable[Any], name: str) -> Spread | None:
    return Spread.of(getattr(sample, name) for sample in samples)


def by_what_varies(load: Load, samples: Iterable[Any]) -> dict[int, list[Any]]:
    """The samples of each depth or size, lowest first."""
    name, _ = load.varies
    found: dict[int, list[Any]] = {}
    for sample in sorted(samples, key=lambda sample: getattr(sample, name)):
        found.setdefault(getattr(sample, name), []).append(sample)
    return found
