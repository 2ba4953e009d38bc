"""The demo's results as a drawing; needs matplotlib (the extra `plot`)."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyvirtio.demo.results import Results, Row, Spread
from pyvirtio.demo.table import NAMES

COLOURS = {False: "#c44e52", True: "#4c72b0"}
WIDTH = 0.38


def draw(results: Results, path: Path) -> None:
    """Write an SVG: reads per second and the share of the vCPU that is left, for each backend."""
    mpl.rcParams.update({"svg.fonttype": "path", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    for column, (backend, name) in enumerate(NAMES.items()):
        rows = [row for row in results.rows() if row.backend == backend]
        speed, left = axes[0][column], axes[1][column]
        speed.set_title(f"backend: {name}")
        _bars(speed, rows, [row.reads_per_second for row in rows], "{:,.0f}")
        _bars(left, rows, [row.cpu_left for row in rows], "{:.0%}")
        left.set_ylim(0, 1.1 * max(1, *(row.cpu_left.high for row in results.rows())))
        left.yaxis.set_major_formatter("{x:.0%}")
        left.set_xlabel("concurrent readers")
    axes[0][0].set_ylabel("reads per second (4 KiB)")
    axes[1][0].set_ylabel("vCPU left to the guest")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"virtio-blk notify: exit to userspace or ioeventfd (Linux {results.kernel}, 1 vCPU)")
    figure.savefig(path, format="svg")


def _bars(axes: Axes, rows: list[Row], figures: list[Spread], form: str) -> None:
    """A pair of bars for each number of readers; the lines show the lowest and the highest round."""
    readers = sorted({row.readers for row in rows})
    for mode, label in ((False, "ioeventfd off"), (True, "ioeventfd on")):
        chosen = [figure for row, figure in zip(rows, figures, strict=True) if row.ioeventfd is mode]
        places = [place + (WIDTH / 2 if mode else -WIDTH / 2) for place in range(len(readers))]
        medians = [figure.median for figure in chosen]
        spread = [[f.median - f.low for f in chosen], [f.high - f.median for f in chosen]]
        bars = axes.bar(places, medians, WIDTH * 0.95, label=label, color=COLOURS[mode], yerr=spread,
                        error_kw={"elinewidth": 1, "ecolor": "#333333", "capsize": 2})  # fmt: skip
        axes.bar_label(bars, [form.format(median) for median in medians], fontsize=8, padding=2)
    axes.set_xticks(range(len(readers)), [str(number) for number in readers])
    axes.margins(y=0.15)
