"""SeaBIOS's own virtio-blk driver boots a disk of ours: an independent driver that any /dev/kvm runs.

The boot sector reads one half of the disk with ioeventfd off, tells the machine to switch it on, and reads the other.
"""

import os
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from code16 import (
    CLI,
    HLT,
    MOV_AL_AH,
    MOV_DS_AX,
    MOV_SS_AX,
    OUT_DX_AL,
    STI,
    XOR_AX_AX,
    add_ax_to,
    assemble,
    cmp_ax,
    dec_word,
    inc_word,
    interrupt,
    jc,
    jmp,
    jnz,
    label,
    load_ax,
    load_dl,
    mov_ah,
    mov_ax_from,
    mov_dx,
    mov_si,
    mov_sp,
    out,
    out_word,
    store_dl,
    text,
)

from pyvirtio.backends.block import File
from pyvirtio.devices.blk import Blk
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
BOOT_SECTOR = 0x7C00
BUFFER = 0x8000
SWITCH_PORT = 0x8F0
COM1 = layout.COM1_PORT


def boot_sector() -> bytes:
    """Reads sectors 1 to 2 * HALF by int 13h (extended read, AH = 42h) and prints the sum of their first words."""
    packet = struct.pack("<BBHHH", 16, 0, 1, BUFFER, 0)
    code = assemble(
        BOOT_SECTOR,
        *(CLI, XOR_AX_AX, MOV_DS_AX, MOV_SS_AX, mov_sp(BOOT_SECTOR), STI, store_dl("drive")),
        label("next"),
        *(mov_si("packet"), load_dl("drive"), mov_ah(0x42), interrupt(0x13), jc("failed")),
        *(mov_ax_from(BUFFER), add_ax_to("sum"), inc_word("sector"), dec_word("left")),
        *(load_ax("left"), cmp_ax(HALF), jnz("go on"), out(SWITCH_PORT, 1)),
        label("go on"),
        *(load_ax("left"), cmp_ax(0), jnz("next")),
        *(text(COM1, "sum "), load_ax("sum"), mov_dx(COM1), OUT_DX_AL, MOV_AL_AH, OUT_DX_AL),
        label("off"),
        *(out_word(layout.PM_CONTROL_PORT, 1 << 13 | 5 << 10), HLT, jmp("off")),
        label("failed"),
        *(text(COM1, "failed"), jmp("off")),
        *(label("packet"), packet, label("sector"), struct.pack("<Q", 1)),
        *(label("drive"), b"\0", label("sum"), b"\0\0", label("left"), struct.pack("<H", 2 * HALF)),
    )
    assert len(code) <= 510
    return code.ljust(510, b"\0") + b"\x55\xaa"


def first_word(sector: int) -> int:
    return sector * 7919 & 0xFFFF


def disk() -> bytes:
    """A bootable disk of 1 MiB; each sector is full of its `first_word`."""
    sectors = (struct.pack("<H", first_word(sector)) * 256 for sector in range(1, 2048))
    return boot_sector() + b"".join(sectors)


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
        self.ran_while_paused = self.function.dataplane.notifiers.running
        self.machine.resume()

    @property
    def counters(self) -> dict[str, int]:
        return self.function.dataplane.queues[0].counters


@dataclass(frozen=True)
class Boot:
    """What one boot printed, and what the queue counted before and after the switch."""

    printed: bytes
    outcome: Outcome
    sync: dict[str, int]
    ioeventfd: dict[str, int]
    ran_while_paused: bool | None


@pytest.fixture(scope="module", params=["legacy", "modern"])
def boot(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Boot:
    image = tmp_path_factory.mktemp("seabios") / "disk.img"
    image.write_bytes(disk())
    read, write = os.pipe()
    with Machine(Firmware.read(SEABIOS), memory=64 * MIB, console_fd=write) as machine:
        os.close(write)
        interface = {"disable_modern": True} if request.param == "legacy" else {"disable_legacy": True}
        switch = Switch(machine, machine.add(Blk(File(image)), "blk0", ioeventfd=False, **interface))
        machine.add_chip(switch)
        outcome = run_guarded(machine)
        after = {name: count - switch.before.get(name, 0) for name, count in switch.counters.items()}
    with os.fdopen(read, "rb") as console:
        return Boot(console.read(), outcome, switch.before, after, switch.ran_while_paused)


def run_guarded(machine: Machine) -> Outcome:
    guard = threading.Timer(HANG_GUARD, machine.quit)
    guard.start()
    try:
        return machine.run(reboot=False)
    finally:
        guard.cancel()


def test_boots_and_reads_what_is_on_the_disk(boot: Boot) -> None:
    total = sum(first_word(sector) for sector in range(1, 2 * HALF + 1)) & 0xFFFF
    assert boot.printed == b"sum " + struct.pack("<H", total)
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


def test_a_driver_that_polls_gets_no_interrupts(boot: Boot) -> None:
    assert boot.sync["interrupts"] == boot.ioeventfd["interrupts"] == 0
