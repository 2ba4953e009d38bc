"""Measurements as drawings; needs matplotlib (the extra `plot`)."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def _line(axes: Axes, samples: list[Sample], name: str, factor: float, colour: str, label: str) -> None:
    depths = by_iodepth(samples)
    places = range(len(depths))
    found = [Spread.of(getattr(sample, name) * factor for sample in rounds) for rounds in depths.values()]
    figures = [figure for figure in found if figure is not None]
    whiskers = [[f.median - f.low for f in figures], [f.high - f.median for f in figures]]
    axes.errorbar(places, [f.median for f in figures], whiskers, color=colour, label=label, marker="o", capsize=3)
    axes.set_xticks(places, [str(depth) for depth in depths])
    axes.set_xlabel("requests in flight")
