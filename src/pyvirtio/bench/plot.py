"""Measurements as drawings; needs matplotlib (the extra `plot`)."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from pyvirtio.bench.compare import Row
from pyvirtio.bench.sample import Load, Sample, by_what_varies, spread_of

COLOURS = ("#4c72b0", "#c44e52")
SPEED = 0
"""Of the figures that are compared this one is better when there is more of it; of the others, less."""


def draw_samples(samples: list[Sample], load: Load, title: str, path: Path) -> None:
    """Write an SVG: figures over the depth, or what else varies; whiskers from the lowest to the highest."""
    mpl.rcParams.update({"svg.fonttype": "path", "axes.spines.top": False, "axes.spines.right": False})
    drawing = Drawing(figsize=(9, 4), layout="constrained")
    for axes, names in zip(drawing.subplots(1, len(load.drawn)), load.drawn, strict=True):
        for name, colour in zip(names, COLOURS, strict=False):
            _line(axes, samples, load, name, colour)
        if len(names) > 1:
            axes.set_yscale("log")
            axes.legend(frameon=False)
        else:
            axes.set_ylabel(load.figures[names[0]].words)
            axes.set_ylim(0)
    drawing.suptitle(title)
    drawing.savefig(path, format="svg")


def draw_ratios(rows: list[Row], load: Load, other: str, path: Path) -> None:
    """Write an SVG: speed and CPU time as ratios to the other back-end; 1 is a draw."""
    mpl.rcParams.update({"svg.fonttype": "path", "axes.spines.top": False, "axes.spines.right": False})
    drawing = Drawing(figsize=(10, 4.5), layout="constrained")
    panels = drawing.subplots(1, 2)
    for at, (axes, name) in enumerate(zip(panels, load.compared, strict=False)):
        _bars(axes, rows, load, name)
        better = "more" if at == SPEED else "less"
        axes.set_title(f"{load.figures[name].words} ({better} is better)")
    handles, labels = panels[SPEED].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    drawing.suptitle(f"pyvirtio serve, relative to {other}")
    drawing.savefig(path, format="svg")


def _bars(axes: Axes, rows: list[Row], load: Load, name: str) -> None:
    """A bar for each of our servers at each load; the lines show the lowest and the highest round."""
    loads = list(dict.fromkeys((row.contest, row.at) for row in rows))
    servers = list(dict.fromkeys(row.server for row in rows))
    width = 0.8 / len(servers)
    for place, (server, colour) in enumerate(zip(servers, COLOURS, strict=False)):
        known = [(loads.index((r.contest, r.at)), r.ratios[name]) for r in rows if r.server == server]
        found = [(at, figure) for at, figure in known if figure is not None]
        places = [at + (place - (len(servers) - 1) / 2) * width for at, _ in found]
        whiskers = [[f.median - f.low for _, f in found], [f.high - f.median for _, f in found]]
        bars = axes.bar(places, [f.median for _, f in found], width * 0.95, label=server, color=colour, yerr=whiskers,
                        error_kw={"elinewidth": 1, "ecolor": "#333333", "capsize": 2})  # fmt: skip
        axes.bar_label(bars, [f"{f.median:.2f}" for _, f in found], fontsize=8, padding=2)
    axes.axhline(1, color="#333333", linewidth=0.8, linestyle="--")
    _, title = load.varies
    axes.set_xticks(range(len(loads)), [f"{contest}\n{title} {at}" for contest, at in loads])


def _line(axes: Axes, samples: list[Sample], load: Load, name: str, colour: str) -> None:
    rounds, figure = by_what_varies(load, samples), load.figures[name]
    spreads = {at: spread_of(found, name) for at, found in rounds.items()}
    known = [(at, spread) for at, spread in spreads.items() if spread is not None]
    places = range(len(known))
    middles, whiskers = [s.median for _, s in known], [[s.median - s.low, s.high - s.median] for _, s in known]
    scaled = [[value * figure.factor for value in values] for values in zip(*whiskers, strict=True)] or None
    axes.errorbar(places, [middle * figure.factor for middle in middles], scaled, color=colour, label=figure.words,
                  marker="o", capsize=3)  # fmt: skip
    axes.set_xticks(places, [str(at) for at, _ in known])
    axes.set_xlabel(load.varies[1])
