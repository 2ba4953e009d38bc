"""Measurements as drawings; needs matplotlib (the extra `plot`)."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyvirtio.bench.compare import Row
from pyvirtio.bench.load import Sample, Spread, by_iodepth

MICRO = 1e6
BLUE, RED = "#4c72b0", "#c44e52"


def draw_samples(samples: list[Sample], title: str, path: Path) -> None:
    """Write an SVG: requests per second and latencies over the depth; whiskers from the lowest to the highest."""
    mpl.rcParams.update({"svg.fonttype": "path", "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(9, 4), layout="constrained")
    speed, latency = figure.subplots(1, 2)
    _line(speed, samples, "iops", 1, BLUE, "")
    for name, label, colour in (("p50", "p50", BLUE), ("p99", "p99", RED)):
        _line(latency, samples, name, MICRO, colour, label)
    speed.set_ylabel("requests per second")
    speed.set_ylim(0)
    latency.set_ylabel("latency in microseconds")
    latency.set_yscale("log")
    latency.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, format="svg")


def draw_ratios(rows: list[Row], other: str, path: Path) -> None:
    """Write an SVG: requests per second and CPU time as ratios to the other back-end; 1 is a draw."""
    mpl.rcParams.update({"svg.fonttype": "path", "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    speed, cpu = figure.subplots(1, 2)
    _bars(speed, rows, "iops", "requests per second (more is better)")
    _bars(cpu, rows, "cpu_per_request", "CPU time per request (less is better)")
    handles, labels = speed.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"pyvirtio serve, relative to {other}")
    figure.savefig(path, format="svg")


def _bars(axes: Axes, rows: list[Row], name: str, title: str) -> None:
    """A bar for each of our servers at each load; the lines show the lowest and the highest round."""
    loads = list(dict.fromkeys((row.storage, row.iodepth) for row in rows))
    servers = list(dict.fromkeys(row.server for row in rows))
    width = 0.8 / len(servers)
    for place, (server, colour) in enumerate(zip(servers, (BLUE, RED), strict=False)):
        known = [(loads.index((r.storage, r.iodepth)), r.ratios[name]) for r in rows if r.server == server]
        found = [(at, figure) for at, figure in known if figure is not None]
        places = [at + (place - (len(servers) - 1) / 2) * width for at, _ in found]
        whiskers = [[f.median - f.low for _, f in found], [f.high - f.median for _, f in found]]
        bars = axes.bar(places, [f.median for _, f in found], width * 0.95, label=server, color=colour, yerr=whiskers,
                        error_kw={"elinewidth": 1, "ecolor": "#333333", "capsize": 2})  # fmt: skip
        axes.bar_label(bars, [f"{f.median:.2f}" for _, f in found], fontsize=8, padding=2)
    axes.axhline(1, color="#333333", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(loads)), [f"{storage}\ndepth {iodepth}" for storage, iodepth in loads])
    axes.set_title(title)


def _line(axes: Axes, samples: list[Sample], name: str, factor: float, colour: str, label: str) -> None:
    depths = by_iodepth(samples)
    places = range(len(depths))
    found = [Spread.of(getattr(sample, name) * factor for sample in rounds) for rounds in depths.values()]
    figures = [figure for figure in found if figure is not None]
    whiskers = [[f.median - f.low for f in figures], [f.high - f.median for f in figures]]
    axes.errorbar(places, [f.median for f in figures], whiskers, color=colour, label=label, marker="o", capsize=3)
    axes.set_xticks(places, [str(depth) for depth in depths])
    axes.set_xlabel("requests in flight")
