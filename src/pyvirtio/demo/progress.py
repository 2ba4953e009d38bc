"""What the demo is doing, shown while it does it: a bar on a terminal, plain lines elsewhere."""

import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pyvirtio.demo.table import MODES, NAMES

STEPS = {
    "boot": "Linux boots in a virtual machine of pyvirtio",
    "checksum": "the guest reads the whole disk for its sha256",
    "measure": "the guest reads and counts, with ioeventfd on and off in turn",
    "network": "the guest sends frames, served in each way in turn",
}


class Steps:
    """The steps of the demo, each with the time it took, and a bar for the windows of the measurement."""

    def __init__(self, console: Console, windows: int) -> None:
        self.console = console
        self._windows = windows
        self._done = 0
        self._step = ""
        self._since = 0.0
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, count="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        self._progress.stop()

    def step(self, what: str) -> None:
        """Begin with something that takes a while; what was being done before is done."""
        self._finish()
        self._step, self._since = what, time.monotonic()
        self._progress.update(self._task, description=what)
        if not self.console.is_terminal:
            self.console.print(f"  {what} ...")

    def show(self, event: str, figures: dict[str, Any]) -> None:
        """An event of the measurement."""
        if event in STEPS:
            self.step(STEPS[event])
        if event == "network":
            self._windows += figures["windows"]
        elif event == "load":
            self._progress.update(self._task, description=describe(figures))
        elif event == "net-load":
            self._progress.update(self._task, description=describe_net(figures))
        elif event == "window":
            speed = f"{figures['chains'] / figures['seconds']:,.0f} reads/s"
            self._window(describe(figures["load"]), speed, figures["notifies"])
        elif event == "net-window":
            speed = f"{figures['frames'] / figures['seconds']:,.0f} frames/s"
            self._window(describe_net(figures["load"]), speed, figures["notifies"])

    def _window(self, what: str, speed: str, exits: int) -> None:
        self._done += 1
        count = f"{self._done}/{self._windows}"
        self._progress.update(self._task, completed=self._done, total=self._windows, count=count)
        if not self.console.is_terminal:
            self.console.print(f"  {count:>5}  {what:<44} {speed}, {exits:,} notify exits")

    def _finish(self) -> None:
        if self._step:
            self.console.print(f"[green]✓[/] {self._step} ({time.monotonic() - self._since:.1f} s)")
        self._step = ""


def describe(load: dict[str, Any]) -> str:
    """A load in words."""
    if not load["readers"]:
        return "idle disks, for comparison"
    plural = "s" if load["readers"] > 1 else ""
    mode = "on" if load["ioeventfd"] else "off"
    return f"{NAMES[load['backend']]}, {load['readers']} reader{plural}, ioeventfd {mode}"


def describe_net(load: dict[str, Any]) -> str:
    """A load of the network card in words."""
    return f"frames of {load['size']} bytes, {MODES[load['mode']]}"
