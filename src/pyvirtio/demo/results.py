"""What the demo's windows say together: medians with their spread, and whether the promises were kept."""

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from pyvirtio.demo.measure import BACKENDS, Load, Window
from pyvirtio.demo.network import MODES, NetLoad, NetWindow


@dataclass(frozen=True)
class Spread:
    """A figure of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One load over all rounds.

    `cpu_left` is the speed of the counting process relative to its best speed while a disk is idle. Counts are sums of
    all rounds; `batch` is how many requests a wake-up served or, with ioeventfd off, a notify exit; None
    if there was none, because the I/O thread always had more to do.
    """

    backend: str
    readers: int
    ioeventfd: bool
    reads_per_second: Spread
    cpu_left: Spread
    reads: int
    notify_exits: int
    kicks: int
    wakeups: int
    batch: float | None
    interrupts: int


@dataclass(frozen=True)
class NetRow:
    """Frames of one size, sent in one mode, over all rounds. Counts are sums of all rounds.

    `speedup` is relative to mode "sync", each pair in the same round. `exits_per_frame` are exits of the virtual
    machine of any kind, also those that never leave the kernel; None where KVM's figures cannot be read.
    """

    size: int
    mode: str
    frames_per_second: Spread
    speedup: Spread
    frames: int
    notify_exits: int
    wakeups: int
    exits_per_frame: float | None


@dataclass(frozen=True)
class Results:
    """Everything the demo found out. Without a tap there are no `net_windows`, and `no_network` says why."""

    kernel: str
    host_sha256: str
    guest_sha256: str
    windows: list[Window]
    net_windows: list[NetWindow] = field(default_factory=list)
    no_network: str | None = None

    @classmethod
    def of(cls, host_sha256: str, events: Iterable[tuple[str, dict[str, Any]]]) -> Self:
        """Of the events that `measure` reported, which may have travelled as JSON."""
        events = list(events)
        once = ("boot", "measure", "no-network")
        figures = {name: value for event, given in events for name, value in given.items() if event in once}
        windows = [Window(**{**given, "load": Load(**given["load"])}) for event, given in events if event == "window"]
        net = [
            NetWindow(**{**given, "load": NetLoad(**given["load"])}) for name, given in events if name == "net-window"
        ]
        return cls(figures["kernel"], host_sha256, figures["sha256"], windows, net, figures.get("reason"))

    def rows(self) -> list[Row]:
        """A row for each load: by backend and number of readers, ioeventfd off and then on."""
        loads = {(w.load.backend, w.load.readers) for w in self.windows if w.load.readers}
        ordered = sorted(loads, key=lambda load: (BACKENDS.index(load[0]), load[1]))
        return [self.row(backend, readers, mode) for backend, readers in ordered for mode in (False, True)]

    def row(self, backend: str, readers: int, ioeventfd: bool) -> Row:
        load = (backend, readers, ioeventfd)
        windows = [w for w in self.windows if (w.load.backend, w.load.readers, w.load.ioeventfd) == load]
        undisturbed = max(w.counted_per_second for w in self.windows if not w.load.readers)
        reads, exits, wakeups = (sum(getattr(w, name) for w in windows) for name in ("chains", "notifies", "wakeups"))
        occasions = wakeups if ioeventfd else exits
        return Row(
            *load,
            reads_per_second=Spread.of(w.chains / w.seconds for w in windows),
            cpu_left=Spread.of(w.counted_per_second / undisturbed for w in windows),
            reads=reads,
            notify_exits=exits,
            kicks=sum(w.kicks for w in windows),
            wakeups=wakeups,
            batch=reads / occasions if occasions else None,
            interrupts=sum(w.interrupts for w in windows),
        )

    def speedup(self, backend: str, readers: int) -> Spread:
        """Reads per second with ioeventfd on relative to off, each pair in the same round."""
        speed = {
            (w.load.round, w.load.ioeventfd): w.chains / w.seconds
            for w in self.windows
            if (w.load.backend, w.load.readers) == (backend, readers)
        }
        return Spread.of(speed[round, True] / max(speed[round, False], 1e-9) for round, on in speed if on)

    def net_rows(self) -> list[NetRow]:
        """A row for each size and mode that was measured."""
        loads = {(w.load.size, w.load.mode) for w in self.net_windows}
        return [self._net_row(*load) for load in sorted(loads, key=lambda load: (load[0], MODES.index(load[1])))]

    def _net_row(self, size: int, mode: str) -> NetRow:
        windows = [w for w in self.net_windows if (w.load.size, w.load.mode) == (size, mode)]
        sync = {
            w.load.round: w.frames_per_second for w in self.net_windows if (w.load.size, w.load.mode) == (size, "sync")
        }
        frames, exits, wakeups = (sum(getattr(w, name) for w in windows) for name in ("frames", "notifies", "wakeups"))
        return NetRow(
            size,
            mode,
            frames_per_second=Spread.of(w.frames_per_second for w in windows),
            speedup=Spread.of(w.frames_per_second / max(sync[w.load.round], 1e-9) for w in windows),
            frames=frames,
            notify_exits=exits,
            wakeups=wakeups,
            exits_per_frame=_per_frame([w.exits for w in windows], frames),
        )

    def problems(self) -> list[str]:
        """Which of the demo's promises were broken, one line for each."""
        problems = []
        if self.guest_sha256 != self.host_sha256:
            problems.append(f"the guest read other data: sha256 {self.guest_sha256} instead of {self.host_sha256}")
        exits = sum(w.notifies for w in self.windows if w.load.ioeventfd)
        exits += sum(w.notifies for w in self.net_windows if w.load.mode != "sync")
        if exits:
            problems.append(f"{exits} notifies left the guest although ioeventfd was on")
        return problems

    def as_json(self) -> dict[str, Any]:
        """All figures: the rows of the table, and the windows they come from."""
        rows = {"rows": [asdict(row) for row in self.rows()], "net_rows": [asdict(row) for row in self.net_rows()]}
        return {**asdict(self), "problems": self.problems(), **rows}


def _per_frame(exits: list[int | None], frames: int) -> float | None:
    known = [count for count in exits if count is not None]
    return sum(known) / frames if frames and len(known) == len(exits) else None
