"""The demo's results as tables for people; they fit a terminal of 80 columns."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pyvirtio.demo.network import POLL_US
from pyvirtio.demo.results import Results, Row, Spread

MODES = {"sync": "ioeventfd off", "ioeventfd": "ioeventfd on", "vhost": "vhost-net"}
NAMES = {"file": "plain file", "slow": "takes 3 ms"}
TITLES = {"file": "A plain file", "slow": "A backend that takes 3 ms for each request"}
WIDTHS = {
    "readers": 7, "ioevent-\nfd": 8, "reads/s": 15, "vCPU left": 12, "notify\nexits": 6, "kicks": 5, "wake-\nups": 5,
    "batch": 5, "inter-\nrupts": 6,
}  # fmt: skip


def table(results: Results) -> RenderableType:
    """A table for each backend, and below them what they mean."""
    rounds = 1 + max(window.load.round for window in results.windows)
    return Group(
        Text(f"\n4 KiB O_DIRECT reads from virtio-blk-pci, Linux {results.kernel} with 1 vCPU\n", "bold"),
        *(_backend(backend, results) for backend in NAMES),
        *([_network(results)] if results.net_windows else []),
        Text(
            f"Speeds are medians (lowest-highest) of {rounds} rounds, counts are sums. vCPU left: speed of a process "
            "that only counts, relative to its speed beside an idle disk. Batch: requests for each wake-up or exit; "
            "- if the I/O thread never slept. Frames are counted by the host's interface. Exits/frame: exits of the "
            "virtual machine for any reason, of which notify exits are those that reach this process. The I/O thread "
            f"and vhost-net look for more frames for {POLL_US} us before they sleep and have to be notified.\n",
            "dim",
        ),
        *(Text(line) for line in summary(results)),
    )


def _backend(backend: str, results: Results) -> Table:
    table = Table(title=TITLES[backend], title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for heading, width in WIDTHS.items():
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    for row in results.rows():
        if row.backend == backend:
            table.add_row(*_cells(row))
    table.add_row()
    return table


def _network(results: Results) -> Table:
    title = "Frames that the guest sends through virtio-net-pci to a tap (pktgen)"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    headings = ("bytes", "served by", "frames/s", "relative\nto off", "notify\nexits", "wake-\nups", "exits/\nframe")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results.net_rows():
        style = "" if row.mode == "sync" else "green"
        wrong = row.mode != "sync" and row.notify_exits
        table.add_row(
            Text(str(row.size) if row.mode == "sync" else ""),
            Text(MODES[row.mode], style),
            Text(_spread(row.frames_per_second, "{:,.0f}"), style),
            Text(_spread(row.speedup, "{:.1f}"), style),
            Text(f"{row.notify_exits:,}", "red" if wrong else style),
            Text("-" if row.mode == "vhost" else f"{row.wakeups:,}", style),
            Text("-" if row.exits_per_frame is None else f"{row.exits_per_frame:.3f}", style),
        )
    table.add_row()
    return table


def _cells(row: Row) -> list[Text]:
    style = "green" if row.ioeventfd else ""
    wrong = row.ioeventfd and row.notify_exits
    return [
        Text("" if row.ioeventfd else str(row.readers)),
        Text("on" if row.ioeventfd else "off", style),
        Text(_spread(row.reads_per_second, "{:,.0f}"), style),
        Text(_spread(row.cpu_left, "{:.0%}"), style),
        Text(f"{row.notify_exits:,}", "red" if wrong else style),
        Text(f"{row.kicks:,}", style),
        Text(f"{row.wakeups:,}", style),
        Text("-" if row.batch is None else f"{row.batch:.1f}", style),
        Text(f"{row.interrupts:,}", style),
    ]


def _spread(figure: Spread, form: str) -> str:
    median, low, high = map(form.format, (figure.median, figure.low, figure.high))
    return f"{median} ({low.removesuffix('%')}-{high.removesuffix('%')})"


def summary(results: Results) -> list[str]:
    """What the figures mean, in whole sentences; the last ones say what is wrong."""
    readers = max(window.load.readers for window in results.windows)
    off, on = (_spread(results.row("slow", readers, mode).cpu_left, "{:.0%}") for mode in (False, True))
    speedup = _spread(results.speedup("file", readers), "{:.1f}")
    lines = [
        f"With {readers} readers of a plain file, ioeventfd gives {speedup} times the reads per second.",
        f"With {readers} readers of a backend that takes 3 ms, the guest keeps {on} of its vCPU with ioeventfd and "
        f"{off} without.",
    ]
    if results.no_network:
        lines.append(f"No network card was measured: {results.no_network}.")
    problems = results.problems()
    if not problems:
        lines.append("The guest read what the host wrote (sha256), and with ioeventfd on no notify left the guest.")
    return lines + [f"FAILED: {problem}" for problem in problems]
