"""The demo's measurement: one boot, windows of load with ioeventfd on and off in turn.

Run as a program (in the lab) it takes a plan and prints what happens as lines of JSON.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pyvirtio.backends.block import BlockBackend, File
from pyvirtio.demo import network
from pyvirtio.devices.blk import Blk
from pyvirtio.errors import ConfigError
from pyvirtio.testing.linux import GuestFailed, LinuxGuest
from pyvirtio.transports.pci import VirtioPci

SLOW_SECONDS = 0.003
BACKENDS = ("file", "slow")
CHECKSUM_TIMEOUT = 300
LINE_TIMEOUT = 120
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "pktgen")

Report = Callable[..., object]
"""Called with the name of an event and its figures: `report("window", backend="file", ...)`."""


@dataclass(frozen=True)
class Plan:
    """What to measure. `seconds` is the length of one window."""

    disk: str
    readers: tuple[int, ...] = (1, 4, 8)
    rounds: int = 3
    seconds: float = 1.5

    def windows(self) -> Iterator["Load"]:
        """Each load with ioeventfd on and off, one right after the other, in an order that changes every round."""
        for round in range(self.rounds):
            for backend in BACKENDS:
                yield Load(backend, 0, True, round)
                for readers in self.readers:
                    for ioeventfd in (True, False) if round % 2 == 0 else (False, True):
                        yield Load(backend, readers, ioeventfd, round)


@dataclass(frozen=True)
class Load:
    """What is done in one window. Without readers the disk is idle and only the counting process runs."""

    backend: str
    readers: int
    ioeventfd: bool
    round: int


@dataclass(frozen=True)
class Window:
    """What happened in one window: the differences of the queue's counters, and how far the guest counted."""

    load: Load
    seconds: float
    counted_per_second: float
    chains: int
    notifies: int
    kicks: int
    wakeups: int
    interrupts: int


class SlowDisk(BlockBackend):
    """Takes 3 ms for every request, as a disk somewhere in a network may."""

    def __init__(self, disk: File) -> None:
        self.disk = disk
        self.capacity = disk.capacity

    def pread(self, length: int, offset: int) -> bytes:
        time.sleep(SLOW_SECONDS)
        return self.disk.pread(length, offset)


def measure(plan: Plan, report: Report) -> None:
    """Boot Linux with the disk and a network card and measure; `report` gets what happens as it happens."""
    functions = files("pyvirtio.demo").joinpath("load.sh").read_text()
    with LinuxGuest(functions=functions, modules=MODULES) as guest:
        file = File(Path(plan.disk), readonly=True)
        disks = {
            "file": guest.machine.add(Blk(file), "file"),
            "slow": guest.machine.add(Blk(SlowDisk(file)), "slow"),
        }
        card = plug_card(guest, report)
        report("boot", kernel=guest.kernel.version)
        guest.boot()
        report("checksum", userspace_exits=guest.machine.exits)
        report("measure", sha256=guest.run("sha256sum /dev/vda", timeout=CHECKSUM_TIMEOUT).split()[0])
        for load in plan.windows():
            report("load", **asdict(load))
            report("window", **asdict(run_window(guest, disks, load, plan.seconds)))
        if card is not None:
            measure_network(guest, card, plan, report)
        guest.type("poweroff -f")
        guest.wait()


def plug_card(guest: LinuxGuest, report: Report) -> network.Card | None:
    """A network card, where a tap is permitted."""
    try:
        return network.Card(guest)
    except ConfigError as error:
        report("no-network", reason=str(error))
        return None


def measure_network(guest: LinuxGuest, card: network.Card, plan: Plan, report: Report) -> None:
    loads = list(network.windows(plan.rounds, card.modes))
    report("network", windows=len(loads))
    guest.run("prepare_to_transmit")
    for load in loads:
        report("net-load", **asdict(load))
        report("net-window", **asdict(card.run_window(guest, load, plan.seconds)))


def run_window(guest: LinuxGuest, disks: dict[str, VirtioPci], load: Load, seconds: float) -> Window:
    """Set the property, let the guest work, and look at the counters when its window begins and ends."""
    disk = disks[load.backend]
    disk.ioeventfd = load.ioeventfd
    [vq] = disk.dataplane.queues
    snapshots: list[tuple[float, dict[str, int]]] = []
    marks: list[float] = []
    counted: list[int] = []

    def on_line(line: str) -> None:
        name, _, value = line.partition(" ")
        if name in ("::begin", "::end"):
            snapshots.append((time.monotonic(), vq.counters))
            marks.append(float(value))
        elif name == "::counted":
            counted.append(int(value))

    device = {"file": "/dev/vda", "slow": "/dev/vdb"}[load.backend]
    guest.run(f"load {device} {load.readers} {seconds:g}", on_line, seconds + LINE_TIMEOUT)
    (start, before), (end, after) = snapshots
    return Window(
        load=load,
        seconds=end - start,
        counted_per_second=(counted[1] - counted[0]) / (marks[1] - marks[0]),
        **{key: after[key] - before[key] for key in ("chains", "notifies", "kicks", "wakeups", "interrupts")},
    )


def main(arguments: list[str]) -> int:
    """The program that the lab runs: the argument is a `Plan` as JSON, and each event a line of it."""
    plan = json.loads(arguments[0])

    def report(event: str, **figures: Any) -> None:
        print(json.dumps({"event": event, **figures}), flush=True)

    try:
        measure(Plan(**{**plan, "readers": tuple(plan["readers"])}), report)
    except ConfigError as error:
        print(f"pyvirtio: {error}")
        return 2
    except GuestFailed as failure:
        print(failure)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
