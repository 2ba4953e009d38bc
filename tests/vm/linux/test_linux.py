"""What a Linux driver makes of our devices: data, modes, resets, and the ends of a machine.

A boot takes long where KVM itself is emulated: with all disks in one guest, two boots are enough for all tests.
"""

import hashlib
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pyvirtio.backends.block import File
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.rng import Rng
from pyvirtio.spec import Feature
from pyvirtio.testing.linux import LinuxGuest
from pyvirtio.transports.pci import VirtioPci
from pyvirtio.vmm.machine import Outcome

KIB = 1 << 10
MIB = 1 << 20
ALWAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "multiqueue": {},
    "filesystem": {},
    "legacy-intx": {"disable_modern": True, "vectors": 0},
}
ATTACHED: dict[str, dict[str, Any]] = {
    **ALWAYS,
    "legacy": {"disable_modern": True},
    "modern": {"disable_legacy": True},
    "modern-intx": {"disable_legacy": True, "vectors": 0},
    "two-vectors": {"vectors": 2},
    "page-per-vq": {"page_per_vq": True},
    "pio-notify": {"modern_pio_notify": True},
    "plain-ring": {"event_idx": False, "indirect_desc": False},
    "packed-ring": {"packed": True},
    "readonly": {},
}
"""The properties of each disk. The guest with one CPU has all of them, the one with two those of `ALWAYS`."""


@dataclass
class Disk:
    """An image on the host and the device that serves it; `node` is its name in the guest."""

    image: Path
    blk: Blk
    pci: VirtioPci
    node: str = ""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.image.read_bytes()).hexdigest()

    def count(self, name: str) -> int:
        """One of the counters of its queues, summed."""
        return sum(vq.counters[name] for vq in self.pci.dataplane.queues)


class Linux(LinuxGuest):
    """A guest with a disk for each way to attach one, and a source of entropy that always says the same."""

    def __init__(self, cpus: int, directory: Path) -> None:
        super().__init__(smp=cpus, modules=("virtio_pci", "virtio_blk", "virtio_rng"))
        self.cpus = cpus
        attached = ATTACHED if cpus == 1 else ALWAYS
        self.disks = {name: self._plug(name, options, directory) for name, options in attached.items()}
        self.rng = self.machine.add(Rng(source=lambda length: b"\xa5" * length), "rng0")

    def _plug(self, name: str, options: dict[str, Any], directory: Path) -> Disk:
        image = directory / f"{name}.img"
        if name == "filesystem":
            image.write_bytes(bytes(32 * MIB))
            subprocess.run(["/sbin/mkfs.ext4", "-q", image], check=True, timeout=60)
        else:
            image.write_bytes(os.urandom(2 * MIB))
        blk = Blk(File(image, readonly=name == "readonly"), serial=name, num_queues=4 if name == "multiqueue" else 1)
        return Disk(image, blk, self.machine.add(blk, name, **options))

    def find_disks(self) -> None:
        """Learn their names, which depend on the order in which the driver found them."""
        for line in self.run("grep . /sys/block/vd*/serial").splitlines():
            path, _, serial = line.partition(":")
            self.disks[serial].node = f"/dev/{path.split('/')[3]}"

    def checksum(self, disk: Disk) -> str:
        """What the guest reads now, past its page cache."""
        return self.run(f"dd if={disk.node} bs=64k iflag=direct 2>/dev/null | sha256sum").split()[0]


@pytest.fixture(scope="module", params=[1, 2], ids=["1cpu", "2cpus"])
def linux(
    kvm_that_runs_linux: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Linux]:
    """A guest that has booted; the tests of one number of CPUs share it."""
    with Linux(request.param, tmp_path_factory.mktemp("disks")) as guest:
        guest.boot()
        guest.find_disks()
        yield guest


@contextmanager
def flipping(disk: Disk, seconds: float = 0.05) -> Iterator[list[bool]]:
    """Switch the ioeventfd of a disk on and off all the time; the list has what it was set to."""
    done, flips = threading.Event(), list[bool]()

    def flip() -> None:
        while not done.wait(seconds):
            disk.pci.ioeventfd = not disk.pci.ioeventfd
            flips.append(disk.pci.ioeventfd)

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        yield flips
    finally:
        done.set()
        thread.join()
        disk.pci.ioeventfd = True


def test_the_driver_found_all_disks(linux: Linux) -> None:
    assert [name for name, disk in linux.disks.items() if not disk.node] == []
    packed = {name for name, disk in linux.disks.items() if disk.pci.driver.has_agreed(Feature.RING_PACKED)}
    assert packed == {"packed-ring"} & linux.disks.keys()
    assert linux.run("nproc") == str(linux.cpus)
    assert len(linux.run(f"ls -d /sys/block/{linux.disks['multiqueue'].node[5:]}/mq/*").split()) == linux.cpus


def test_the_guest_reads_what_each_disk_holds_in_both_modes(linux: Linux) -> None:
    for disk in linux.disks.values():
        for mode in (True, False):
            disk.pci.ioeventfd = mode
            exits, wakeups = disk.count("notifies"), disk.count("wakeups")
            assert linux.checksum(disk) == disk.sha256
            assert (disk.count("notifies") > exits) is not mode
            assert (disk.count("wakeups") > wakeups) is mode
        disk.pci.ioeventfd = True


def test_interrupts_arrive_as_they_were_set_up(linux: Linux) -> None:
    interrupts = linux.run("grep virtio /proc/interrupts").splitlines()
    lines = [line.split() for line in interrupts if "IO-APIC" in line]
    assert sum(len([name for name in line if "virtio" in name]) for line in lines) == sum(
        options.get("vectors") == 0 for options in (ATTACHED if linux.cpus == 1 else ALWAYS).values()
    )
    assert sum("PCI-MSI" in line and "req.0" in line for line in interrupts) == len(linux.disks) - len(lines)


def test_eight_readers_at_once_read_what_the_disk_holds(linux: Linux) -> None:
    disk = linux.disks["default"]
    exits = disk.count("notifies")
    linux.run(
        f"for n in 0 1 2 3 4 5 6 7; do dd if={disk.node} bs=4k skip=$((n * 64)) count=64 iflag=direct 2>/dev/null | "
        "sha256sum >/tmp/sum$n & done; wait"
    )
    data = disk.image.read_bytes()
    parts = [data[at : at + 256 * KIB] for at in range(0, 2 * MIB, 256 * KIB)]
    assert linux.run("cut -d' ' -f1 /tmp/sum?").split() == [hashlib.sha256(part).hexdigest() for part in parts]
    assert disk.count("notifies") == exits


def test_no_data_is_lost_while_ioeventfd_flips(linux: Linux) -> None:
    disk = linux.disks["multiqueue"]
    linux.run("dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null")
    expected = linux.run("sha256sum </tmp/data").split()[0]
    with flipping(disk) as flips:
        for _ in range(5):
            linux.run(f"dd if=/tmp/data of={disk.node} bs=4k oflag=direct 2>/dev/null")
            linux.run(f"dd if={disk.node} bs=4k count=256 iflag=direct 2>/dev/null | cmp - /tmp/data")
    assert {True, False} <= set(flips)
    assert hashlib.sha256(disk.image.read_bytes()[:MIB]).hexdigest() == expected


def test_what_is_discarded_reads_as_zeroes(linux: Linux) -> None:
    disk = linux.disks["multiqueue"]
    linux.run(f"blkdiscard -o {MIB} -l {512 * KIB} {disk.node}")
    data = disk.image.read_bytes()
    assert data[MIB : MIB + 512 * KIB] == bytes(512 * KIB)
    assert data[MIB + 512 * KIB :] != bytes(512 * KIB)
    assert linux.checksum(disk) == disk.sha256


def test_only_a_disk_that_was_meant_to_be_is_readonly(linux: Linux) -> None:
    readonly = [name for name, disk in linux.disks.items() if linux.run(f"blockdev --getro {disk.node}") == "1"]
    assert readonly == [name for name in linux.disks if name == "readonly"]


def test_ext4_is_whole_after_it_was_written_and_unmounted(linux: Linux) -> None:
    disk = linux.disks["filesystem"]
    flushes = disk.blk.plane.counters["flushes"]
    linux.run(f"mount -t ext4 {disk.node} /mnt")
    with flipping(disk):
        linux.run(
            "mkdir /mnt/d; for n in $(seq 40); do seq $((n * 100)) >/mnt/d/$n; done; cp /bin/busybox /mnt/busybox"
        )
        linux.run("rm /mnt/d/1* && sync && echo 3 >/proc/sys/vm/drop_caches && cmp /bin/busybox /mnt/busybox")
    linux.run("umount /mnt")
    assert disk.blk.plane.counters["flushes"] > flushes
    check = subprocess.run(["/sbin/e2fsck", "-fn", disk.image], capture_output=True, text=True, timeout=60)
    assert check.returncode == 0, check.stdout
    read = subprocess.run(["/sbin/debugfs", "-R", "cat /d/29", disk.image], capture_output=True, text=True, timeout=60)
    assert read.stdout.split() == [str(number) for number in range(1, 2901)]


def test_the_driver_comes_back_twenty_times(linux: Linux) -> None:
    """With two CPUs; the other guest has so many disks that three times have to do."""
    disk = linux.disks["default"]
    expected = hashlib.sha256(disk.image.read_bytes()[: 64 * KIB]).hexdigest()
    for round in range(20 if linux.cpus == 2 else 3):
        disk.pci.ioeventfd = round % 2 == 0
        linux.run("rmmod virtio_blk && insmod /modules/virtio_blk.ko")
        linux.find_disks()
        read = linux.run(f"dd if={disk.node} bs=4k count=16 iflag=direct 2>/dev/null | sha256sum")
        assert read.split()[0] == expected
        assert disk.pci.dataplane.notifiers.mode(0) == ("ioeventfd" if round % 2 == 0 else "sync")
    disk.pci.ioeventfd = True


def test_entropy_comes_from_the_host(linux: Linux) -> None:
    assert linux.run("cat /sys/class/misc/hw_random/rng_current").startswith("virtio_rng")
    assert linux.run("head -c 32 /dev/hwrng | hexdump -ve '1/1 \"%02x\"'; echo") == "a5" * 32


def test_the_drivers_had_nothing_to_complain_about(linux: Linux) -> None:
    """Since init started; what the kernel thinks of the CPU before that is another matter."""
    complaints = "error|nobody cared|warning:|bug:|blocked for more|invalid|lockup|stall"
    assert linux.run(f"dmesg | sed '1,/Run .init/d' | grep -iE '{complaints}' || true") == ""


def test_reboot_and_poweroff(linux: Linux) -> None:
    linux.type("reboot -f")
    linux.wait_for_shell()
    linux.find_disks()
    assert linux.checksum(linux.disks["default"]) == linux.disks["default"].sha256
    linux.type("poweroff -f")
    assert linux.wait() is Outcome.POWEROFF
