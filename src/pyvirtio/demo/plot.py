"""The demo's results as a drawing; needs matplotlib (the extra `plot`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from pyvirtio.demo.results import Results, Spread
from pyvirtio.demo.table import MODES, NAMES

COLOURS = {"sync": "#c44e52", "ioeventfd": "#4c72b0", "vhost": "#55a868"}
GROUP = 0.78
"""Width of the bars that stand together, where 1 is the distance between two groups."""


def draw(results: Results, path: Path) -> None:
    """Write an SVG: for each backend reads per second and the share of the vCPU that is left; frames per second."""
    mpl.rcParams.update({"svg.fonttype": "path", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    network = bool(results.net_windows)
    figure = Figure(figsize=(9, 9.5 if network else 6.5), layout="constrained")
    figure.suptitle(f"Notify: exit to userspace, ioeventfd, or vhost (Linux {results.kernel}, 1 vCPU)")
    grid = figure.add_gridspec(2, 1, height_ratios=[2, 1]) if network else figure.add_gridspec(1, 1)
    _draw_disks(figure.add_subfigure(grid[0]), results)
    if network:
        _draw_network(figure.add_subfigure(grid[1]), results)
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="svg")


def _draw_disks(figure: SubFigure, results: Results) -> None:
    axes = figure.subplots(2, 2, sharex="col")
    for column, (backend, name) in enumerate(NAMES.items()):
        rows = [row for row in results.rows() if row.backend == backend]
        readers = sorted({row.readers for row in rows})
        speed, left = axes[0][column], axes[1][column]
        by_mode = {"sync": [row for row in rows if not row.ioeventfd], "ioeventfd": [r for r in rows if r.ioeventfd]}
        speed.set_title(f"virtio-blk, backend: {name}")
        _bars(speed, readers, {mode: [row.reads_per_second for row in by_mode[mode]] for mode in by_mode}, "{:,.0f}")
        _bars(left, readers, {mode: [row.cpu_left for row in by_mode[mode]] for mode in by_mode}, "{:.0%}")
        left.set_ylim(0, 1.1 * max(1, *(row.cpu_left.high for row in results.rows())))
        left.yaxis.set_major_formatter("{x:.0%}")
        left.set_xlabel("concurrent readers")
    axes[0][0].set_ylabel("reads per second (4 KiB)")
    axes[1][0].set_ylabel("vCPU left to the guest")


def _draw_network(figure: SubFigure, results: Results) -> None:
    rows = results.net_rows()
    axes = figure.subplots(1, 1)
    axes.set_title("virtio-net to a tap")
    modes = {row.mode: [r.frames_per_second for r in rows if r.mode == row.mode] for row in rows}
    _bars(axes, sorted({row.size for row in rows}), modes, "{:,.0f}")
    axes.set_xlabel("bytes in a frame")
    axes.set_ylabel("frames sent per second")


def _bars(axes: Axes, groups: Sequence[int], figures: Mapping[str, Sequence[Spread]], form: str) -> None:
    """A bar for each mode in every group; the lines show the lowest and the highest round."""
    width = GROUP / len(figures)
    for number, (mode, chosen) in enumerate(figures.items()):
        places = [place + (number - (len(figures) - 1) / 2) * width for place in range(len(groups))]
        medians = [figure.median for figure in chosen]
        spread = [[f.median - f.low for f in chosen], [f.high - f.median for f in chosen]]
        bars = axes.bar(places, medians, width * 0.95, label=MODES[mode], color=COLOURS[mode], yerr=spread,
                        error_kw={"elinewidth": 1, "ecolor": "#333333", "capsize": 2})  # fmt: skip
        axes.bar_label(bars, [form.format(median) for median in medians], fontsize=8, padding=2)
    axes.set_xticks(range(len(groups)), [str(group) for group in groups])
    axes.margins(y=0.15)
