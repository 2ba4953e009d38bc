"""The demo's results as a table for people."""

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pyvirtio.demo.results import Results, Row, Spread

NAMES = {"file": "plain file", "slow": "takes 3 ms"}


def table(results: Results) -> RenderableType:
    """The table, and below it what it means."""
    rounds = 1 + max(window.load.round for window in results.windows)
    table = Table(
        title=f"Linux {results.kernel}, 1 vCPU, 4 KiB O_DIRECT reads from virtio-blk-pci",
        caption=f"Speeds: median (lowest-highest) of {rounds} rounds. Counts: sums of all rounds.",
        title_justify="left", caption_justify="left", box=SIMPLE_HEAD, title_style="bold", padding=(0, 1),
    )  # fmt: skip
    table.add_column("backend", no_wrap=True)
    for heading in (
        "readers",
        "ioeventfd",
        "reads/s",
        "vCPU left",
        "notify\nexits",
        "kicks",
        "wake-\nups",
        "requests\nat once",
        "interrupts",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for row in results.rows():
        if before is not None and before != row.backend:
            table.add_section()
        table.add_row(*_cells(row, NAMES[row.backend] if before != row.backend else ""))
        before = row.backend
    return Group(table, Text(), *(Text(line) for line in summary(results)))


def _cells(row: Row, name: str) -> list[Text]:
    style = "green" if row.ioeventfd else ""
    exits_style = style if row.ioeventfd == (row.notify_exits == 0) else "red"
    return [
        Text(name),
        Text(str(row.readers) if not row.ioeventfd else ""),
        Text("on" if row.ioeventfd else "off", style),
        Text(_spread(row.reads_per_second, "{:,.0f}"), style),
        Text(_spread(row.cpu_left, "{:.0%}"), style),
        Text(f"{row.notify_exits:,}", exits_style),
        Text(f"{row.kicks:,}", style),
        Text(f"{row.wakeups:,}", style),
        Text(f"{row.requests_at_once:.1f}", style),
        Text(f"{row.interrupts:,}", style),
    ]


def _spread(figure: Spread, form: str) -> str:
    median, low, high = map(form.format, (figure.median, figure.low, figure.high))
    return f"{median} ({low.removesuffix('%')}-{high.removesuffix('%')})"


def summary(results: Results) -> list[str]:
    """What the figures mean, in whole sentences; the last ones say what is wrong."""
    readers = max(window.load.readers for window in results.windows)
    file, slow = ([results.row(name, readers, mode) for mode in (False, True)] for name in ("file", "slow"))
    ratio = file[1].reads_per_second.median / max(file[0].reads_per_second.median, 1e-9)
    lines = [
        f"With {readers} readers of a plain file, ioeventfd gives {ratio:.1f} times the reads per second.",
        f"While a backend takes 3 ms for each request of {readers} readers, the guest keeps "
        f"{slow[1].cpu_left.median:.0%} of its vCPU with ioeventfd and {slow[0].cpu_left.median:.0%} without.",
    ]
    problems = results.problems()
    if not problems:
        lines.append("The guest read what the host wrote (sha256), and with ioeventfd on no notify left the guest.")
    return lines + [f"FAILED: {problem}" for problem in problems]
