"""Figures of measurements as tables for people; they fit a terminal of 80 columns."""

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pyvirtio.bench.compare import FIGURES, Result, Row
from pyvirtio.bench.load import Load, Sample, Spread, by_iodepth
from pyvirtio.properties import show_size

MICRO = 1e6
MIB = 1 << 20
NOT_KNOWN = "-"
UNITS = "Latencies and the back-end's CPU time for a request in microseconds."
SHOWN = {"cpu_per_request": "{:.2f}", "p50": "{:,.0f}"}


def samples_table(title: str, load: Load, samples: list[Sample]) -> RenderableType:
    """A row for each depth: medians of all rounds, with the lowest and the highest number of requests per second."""
    table = _table(title, "depth", "requests/s", "MiB/s", "p50", "p99", "p99.9", "CPU")
    for iodepth, rounds in by_iodepth(samples).items():
        table.add_row(
            str(iodepth),
            spread(Spread.of(s.iops for s in rounds), "{:,.0f}"),
            _median(rounds, "bandwidth", 1 / MIB, "{:,.0f}"),
            *(_median(rounds, name, MICRO, "{:,.0f}") for name in ("p50", "p99", "p99_9")),
            _median(rounds, "cpu_per_request", MICRO, "{:.2f}"),
        )
    note = f"Medians (lowest-highest) of all rounds. {UNITS}"
    return Group(table, Text(describe(load)), Text(f"The back-end had {resident(samples)}."), Text(note, "dim"))


def ratios_table(rows: list[Row], other: str, results: list[Result]) -> RenderableType:
    """Ours against theirs: for each storage, depth and server the ratios, and below that what they are ratios of."""
    table = _table(f"Ours against {other}", "storage", "depth", "server", "requests/s", "CPU", "p50")
    plain = _table("The figures", "storage", "depth", "server", "requests/s", "CPU", "p50")
    for row in rows:
        names = row.storage, str(row.iodepth)
        table.add_row(*names, row.server, *(spread(row.ratios[name], "{:.2f}") for name in FIGURES))
        if row.server == rows[0].server:
            plain.add_row(*names, other, *_figures(row.theirs))
        plain.add_row(*names, row.server, *_figures(row.ours))
    note = f"Medians (lowest-highest) of all rounds. Ratios: ours divided by {other} in the same round. {UNITS}"
    return Group(table, Text(), plain, *_memory(results), Text(note, "dim"))


def _memory(results: list[Result]) -> Iterable[Text]:
    """A line for each process."""
    for storage, server in dict.fromkeys((result.storage, result.server) for result in results):
        samples = [r.sample for r in results if (r.storage, r.server) == (storage, server)]
        yield Text(f"{storage}, {server}: {resident(samples)}.")


def _figures(figures: dict[str, Spread | None]) -> list[str]:
    return [spread(figures["iops"], "{:,.0f}"), *(spread(figures[name], form, MICRO) for name, form in SHOWN.items())]


def describe(load: Load) -> str:
    """The load in words."""
    queues = "1 queue" if load.num_queues == 1 else f"{load.num_queues} queues"
    ring = f"{'packed' if load.packed else 'split'} ring, {'indirect' if load.indirect else 'direct'} descriptors"
    completion = "polled" if load.poll else "interrupts"
    verified = ", verified" if load.verify else ""
    return f"{load.rw} of {show_size(load.block_size)}, {queues}, {ring}, {completion}{verified}."


def resident(samples: list[Sample]) -> str:
    """What the memory of a process was, in words; the samples are in the order in which they were taken."""
    first, last = samples[0].rss, samples[-1].rss
    if first is None or last is None:
        return "an unknown amount of memory resident"
    return f"{first[0] / MIB:.1f} MiB of memory resident at the start, {last[1] / MIB:.1f} MiB at the end"


def spread(figure: Spread | None, form: str, factor: float = 1) -> str:
    if figure is None:
        return NOT_KNOWN
    middle, low, high = (form.format(value * factor) for value in (figure.median, figure.low, figure.high))
    return f"{middle} ({low}-{high})"


def _median(samples: list[Sample], name: str, factor: float, form: str) -> str:
    found = Spread.of(getattr(sample, name) for sample in samples)
    return NOT_KNOWN if found is None else form.format(found.median * factor)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
