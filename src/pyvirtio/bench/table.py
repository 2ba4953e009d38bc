"""Figures of measurements as tables for people; they fit a terminal of 80 columns."""

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pyvirtio.bench.compare import Result, Row
from pyvirtio.bench.load import MIB
from pyvirtio.bench.sample import Figure, Load, Sample, Spread, by_what_varies, spread_of

RATIO = "{:.2f}"


def samples_table(title: str, load: Load, samples: list[Sample]) -> RenderableType:
    """A row for each depth, or what else varies: medians of all rounds, with the extremes of the first figure."""
    first, *others = load.figures
    table = _table(title, load.varies[1], *(figure.title for figure in load.figures.values()))
    for at, rounds in by_what_varies(load, samples).items():
        table.add_row(
            str(at),
            load.figures[first].spread(spread_of(rounds, first)),
            *(load.figures[name].median(spread_of(rounds, name)) for name in others),
        )
    note = f"Medians (lowest-highest) of all rounds. {load.units}"
    return Group(table, Text(load.describe()), Text(f"The back-end had {resident(samples)}."), Text(note, "dim"))


def ratios_table(rows: list[Row], load: Load, other: str, results: list[Result]) -> RenderableType:
    """Ours against theirs: for each contest, point and server the ratios, and below that what they are ratios of."""
    figures = {name: load.figures[name] for name in load.compared}
    columns = ("back-end", load.varies[1], "server", *(figure.title for figure in figures.values()))
    table, plain = _table(f"Ours against {other}", *columns), _table("The figures", *columns)
    for row in rows:
        names = row.contest, str(row.at)
        ratios = (Figure(figure.title, figure.words, RATIO) for figure in figures.values())
        table.add_row(*names, row.server, *_spreads(dict(zip(figures, ratios, strict=True)), row.ratios))
        if row.server == rows[0].server:
            plain.add_row(*names, other, *_spreads(figures, row.theirs))
        plain.add_row(*names, row.server, *_spreads(figures, row.ours))
    note = f"Medians (lowest-highest) of all rounds. Ratios: ours divided by {other} in the same round. {load.units}"
    return Group(table, Text(), plain, *_memory(results), Text(note, "dim"))


def _spreads(figures: dict[str, Figure], spreads: dict[str, Spread | None]) -> list[str]:
    return [figure.spread(spreads[name]) for name, figure in figures.items()]


def _memory(results: list[Result]) -> Iterable[Text]:
    """A line for each process."""
    for contest, server in dict.fromkeys((result.contest, result.server) for result in results):
        samples = [r.sample for r in results if (r.contest, r.server) == (contest, server)]
        yield Text(f"{contest}, {server}: {resident(samples)}.")


def resident(samples: list[Sample]) -> str:
    """What the memory of a process was, in words; the samples are in the order in which they were taken."""
    first, last = samples[0].rss, samples[-1].rss
    if first is None or last is None:
        return "an unknown amount of memory resident"
    return f"{first[0] / MIB:.1f} MiB of memory resident at the start, {last[1] / MIB:.1f} MiB at the end"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
