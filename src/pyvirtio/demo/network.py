"""The network half of the demo's measurement: frames that the guest sends, by who serves the transmit queue.

The frames come from the kernel's own generator (pktgen) in the guest, and are counted where they arrive: at the tap.
"""

import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyvirtio.backends.tap import Tap
from pyvirtio.devices.net import Net
from pyvirtio.testing.linux import LinuxGuest
from pyvirtio.transports.pci import VirtioPci

MODES = ("sync", "ioeventfd", "vhost")
"""The thread of the vCPU, the I/O thread, or the kernel's vhost-net."""
SIZES = (64, 1500)
"""Bytes of a frame."""
TRANSMITQ = 1
POLL_US = 32
"""How long vhost looks for more frames before it sleeps: as long as an I/O thread does by default (poll-max-ns)."""
LINE_TIMEOUT = 120

# <linux/sockios.h>, <linux/if.h>
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914
IFF_UP = 1
IFREQ_FLAGS = struct.Struct("16sh22x")


@dataclass(frozen=True)
class NetLoad:
    """What is done in one window: frames of one size, as many as the guest can send."""

    size: int
    mode: str
    round: int


@dataclass(frozen=True)
class NetWindow:
    """What happened in one window: frames at the tap, and the differences of the transmit queue's counters.

    Of what vhost serves the counters know nothing but the notifies that left the guest. `exits` are all of the
    virtual machine, also those that only the kernel sees; None if it does not tell.
    """

    load: NetLoad
    seconds: float
    frames: int
    notifies: int
    wakeups: int
    exits: int | None = None

    @property
    def frames_per_second(self) -> float:
        return self.frames / self.seconds


def windows(rounds: int, modes: tuple[str, ...]) -> Iterator[NetLoad]:
    """Each size in all modes, one right after the other, in an order that changes every round."""
    for round in range(rounds):
        for size in SIZES:
            for mode in modes if round % 2 == 0 else modes[::-1]:
                yield NetLoad(size, mode, round)


class Card:
    """A network card on a tap of its own. `modes` are those that this host can do."""

    def __init__(self, guest: LinuxGuest) -> None:
        self.tap = Tap(vhost=True, poll_us=POLL_US)
        _bring_up(self.tap.ifname)
        self.pci: VirtioPci = guest.plug(Net(self.tap, mac="52:54:00:00:00:01"), "net0")
        self.modes = MODES if self.tap.vhost_fds else MODES[:2]

    def run_window(self, guest: LinuxGuest, load: NetLoad, seconds: float) -> NetWindow:
        """Let the guest send, and look at the counters when its window begins and ends."""
        self._set_mode(load.mode)
        snapshots: list[tuple[float, int, int | None, dict[str, int]]] = []

        def on_line(line: str) -> None:
            if line.startswith(("::begin", "::end")):
                snapshots.append((time.monotonic(), self._frames(), vm_exits(), self._transmitq_counters()))

        guest.run(f"transmit {load.size} {seconds:g}", on_line, seconds + LINE_TIMEOUT)
        (start, frames, exits, before), (end, more_frames, more_exits, after) = snapshots
        counted = {name: after[name] - before[name] for name in ("notifies", "wakeups")}
        left = None if exits is None or more_exits is None else more_exits - exits
        return NetWindow(load, end - start, more_frames - frames, **counted, exits=left)

    def _set_mode(self, mode: str) -> None:
        if self.pci.vhost is not None:
            self.pci.vhost.enabled = mode == "vhost"
        self.pci.ioeventfd = mode != "sync"

    def _frames(self) -> int:
        return int(Path(f"/sys/class/net/{self.tap.ifname}/statistics/rx_packets").read_text())

    def _transmitq_counters(self) -> dict[str, int]:
        return self.pci.dataplane.queues[TRANSMITQ].counters


def vm_exits(root: Path = Path("/")) -> int | None:
    """Exits of this process's only virtual machine so far, where KVM's figures may be read (debugfs, root)."""
    try:
        [figure] = (root / "sys/kernel/debug/kvm").glob(f"{os.getpid()}-*/exits")
        return int(figure.read_text())
    except (OSError, ValueError):
        return None


def _bring_up(ifname: str) -> None:
    """An interface that is down refuses frames."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        _, flags = IFREQ_FLAGS.unpack(fcntl.ioctl(control, SIOCGIFFLAGS, IFREQ_FLAGS.pack(ifname.encode(), 0)))
        fcntl.ioctl(control, SIOCSIFFLAGS, IFREQ_FLAGS.pack(ifname.encode(), flags | IFF_UP))
