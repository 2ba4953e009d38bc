"""SeaBIOS's own virtio-blk driver boots a disk of ours: an independent driver that any /dev/kvm runs.

The boot sector reads one half of the disk with ioeventfd off, tells the machine to switch it on, and reads the other.
"""

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import bootdisk
import pytest
from code16 import out, out_word

from pyvirtio.backends.block import File
from pyvirtio.devices.blk import Blk
from pyvirtio.lint import Lint
from pyvirtio.transports.pci import VirtioPci
from pyvirtio.vmm import layout
from pyvirtio.vmm.firmware import Firmware
from pyvirtio.vmm.layout import MIB
from pyvirtio.vmm.machine import Machine, Outcome

SEABIOS = Path("/usr/share/seabios/bios-256k.bin")
HANG_GUARD = 120

pytestmark = [
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no usable /dev/kvm"),
    pytest.mark.skipif(not SEABIOS.exists(), reason="the package seabios is not installed"),
]

HALF = 250
"""Sectors that the boot sector reads in each mode."""
SWITCH_PORT = 0x8F0
POWER_OFF = out_word(layout.PM_CONTROL_PORT, 1 << 13 | 5 << 10)


@dataclass
class Switch:
    """The port by which the guest asks for ioeventfd; notes what the queue had counted until then.

    The machine is paused once afterwards.
    """

    machine: Machine
    function: VirtioPci
    before: dict[str, int] = field(default_factory=dict)
    ran_while_paused: bool | None = None
    ports = (SWITCH_PORT,)

    def read(self, port: int, size: int) -> int:
        return 0xFF

    def write(self, port: int, size: int, value: int) -> None:
        self.before = self.counters
        self.function.ioeventfd = True
        threading.Thread(target=self.pause).start()  # a CPU cannot wait for itself

    def pause(self) -> None:
        self.machine.pause()
        self.ran_while_paused = self.function.dataplane.queues[0].attached
        self.machine.resume()

    @property
    def counters(self) -> dict[str, int]:
        return self.function.dataplane.queues[0].counters


@dataclass(frozen=True)
class Boot:
    """What one boot printed, what the queue counted before and after the switch, and what the lint says of it all."""

    printed: bytes
    outcome: Outcome
    sync: dict[str, int]
    ioeventfd: dict[str, int]
    ran_while_paused: bool | None
    violations: list[str]


@pytest.fixture(scope="module", params=["legacy", "modern"])
def boot(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Boot:
    image = tmp_path_factory.mktemp("seabios") / "disk.img"
    image.write_bytes(bootdisk.image(2 * HALF, leave=POWER_OFF, halfway=out(SWITCH_PORT, 1)))
    read, write = os.pipe()
    with Machine(Firmware.read(SEABIOS), memory=64 * MIB, console_fd=write) as machine:
        os.close(write)
        lint = Lint()
        machine.virtio_pci = lint.virtio_pci
        interface = {"disable_modern": True} if request.param == "legacy" else {"disable_legacy": True}
        switch = Switch(machine, machine.add(Blk(File(image)), "blk0", ioeventfd=False, **interface))
        machine.add_chip(switch)
        outcome = run_guarded(machine)
        after = {name: count - switch.before.get(name, 0) for name, count in switch.counters.items()}
    violations = [violation.text for violation in lint.take()]
    with os.fdopen(read, "rb") as console:
        return Boot(console.read(), outcome, switch.before, after, switch.ran_while_paused, violations)


def run_guarded(machine: Machine) -> Outcome:
    guard = threading.Timer(HANG_GUARD, machine.quit)
    guard.start()
    try:
        return machine.run(reboot=False)
    finally:
        guard.cancel()


def test_boots_and_reads_what_is_on_the_disk(boot: Boot) -> None:
    assert boot.printed == bootdisk.answer(2 * HALF)
    assert boot.outcome is Outcome.POWEROFF


def test_without_ioeventfd_every_read_is_a_notify_exit(boot: Boot) -> None:
    assert boot.sync["chains"] == HALF + 1  # SeaBIOS read the boot sector itself
    assert boot.sync["notifies"] == boot.sync["chains"]
    assert boot.sync["wakeups"] == 0


def test_with_ioeventfd_no_notify_exits(boot: Boot) -> None:
    assert boot.ioeventfd["chains"] == HALF
    assert boot.ioeventfd["notifies"] == 0
    assert 0 < boot.ioeventfd["wakeups"] <= boot.ioeventfd["kicks"]


def test_a_pause_takes_the_notifiers_down_and_loses_no_kick(boot: Boot) -> None:
    assert boot.ran_while_paused is False
    assert boot.outcome is Outcome.POWEROFF


def test_the_driver_does_not_wait_for_a_reset(boot: Boot, request: pytest.FixtureRequest) -> None:
    """And breaks no other rule that the lint knows; the legacy interface does not ask for that one."""
    modern = "modern" in request.node.callspec.id
    assert boot.violations == ["wrote to device_status before it had read 0 after a reset"] * modern


def test_a_driver_that_polls_gets_no_interrupts(boot: Boot) -> None:
    assert boot.sync["interrupts"] == boot.ioeventfd["interrupts"] == 0


class SnapshotAtHalf:
    """A port: whoever writes to it is written to a file, and ends."""

    ports = (SWITCH_PORT,)

    def __init__(self, machine: Machine, path: Path) -> None:
        self.machine, self.path = machine, path

    def read(self, port: int, size: int) -> int:
        return 0xFF

    def write(self, port: int, size: int, value: int) -> None:
        threading.Thread(target=self._take).start()  # a CPU cannot wait for itself

    def _take(self) -> None:
        self.machine.pause()
        self.machine.snapshot(self.path)
        self.machine.quit()


def make(image: Path, console: int) -> Machine:
    machine = Machine(Firmware.read(SEABIOS), memory=64 * MIB, console_fd=console)
    machine.add(Blk(File(image)), "blk0", ioeventfd=False, disable_legacy=True)
    return machine


def test_the_other_half_is_read_after_a_snapshot(tmp_path: Path) -> None:
    """By another machine, which goes on with ioeventfd although it was told otherwise."""
    image, snapshot = tmp_path / "disk.img", tmp_path / "half"
    image.write_bytes(bootdisk.image(2 * HALF, leave=POWER_OFF, halfway=out(SWITCH_PORT, 1)))
    read, write = os.pipe()
    with make(image, write) as first:
        first.devices[0].ioeventfd = True
        first.add_chip(SnapshotAtHalf(first, snapshot))
        assert run_guarded(first) is Outcome.QUIT
        chains = first.devices[0].dataplane.queues[0].counters["chains"]
        assert HALF <= chains < 2 * HALF
    with make(image, write) as second:
        second.restore(snapshot)
        assert run_guarded(second) is Outcome.POWEROFF
        assert second.devices[0].ioeventfd
        assert second.devices[0].dataplane.queues[0].counters["chains"] == 2 * HALF + 1 - chains
    os.close(write)
    with os.fdopen(read, "rb") as console:
        assert console.read() == bootdisk.answer(2 * HALF)
