"""One machine in one process: guest RAM, a PCI bus, an I/O thread, and a driver that obeys virtio unless told not to.

No KVM and no kernel: the in-process accelerator plays the vCPU's side, all the rest is what a real machine runs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self, cast

from pyvirtio._core import GuestMemory
from pyvirtio.accel.inproc import InProcess
from pyvirtio.dataplane import IoThread
from pyvirtio.device import Device
from pyvirtio.lint import Lint
from pyvirtio.testing.driver import Interface, VirtioDriver
from pyvirtio.testing.heap import Heap
from pyvirtio.testing.queue import Range
from pyvirtio.testing.raw import RawBus
from pyvirtio.testing.served import VhostUserDriver
from pyvirtio.testing.trace import Traced
from pyvirtio.transports.pci import VirtioPci
from pyvirtio.vmm.pci_bus import IO_WINDOW, MEMORY_WINDOW, PciBus

MIB = 1 << 20
MSI_ADDRESS = 0xFEE00000
PAGE = 4096
ZEROES = bytes(PAGE)

Transport = Literal["modern", "legacy", "vhost-user"]
Driver = VirtioDriver | VhostUserDriver


class Guest:
    """A machine to plug devices into. RAM is two adjacent regions from 0 on and, behind a hole, a third above 4 GiB.

    `transport`, `ioeventfd`, `indirect`, `packed` are what `plug` asks for unless it is told; `ioeventfd=None` leaves
    it to the device, and vhost-user knows nothing else. With `lint` what drivers and devices do is checked against the
    specification, with `trace` the last accesses are kept for `trace.describe`. `raw` is the machine without its
    drivers.
    """

    HIGH = 1 << 32
    """Where the third region starts at the lowest."""

    def __init__(
        self,
        *,
        transport: Transport = "modern",
        ioeventfd: bool | None = None,
        indirect: bool = False,
        packed: bool = False,
        lint: bool = False,
        trace: bool = False,
        memory: int = 4 * MIB,
    ) -> None:
        self.lint = Lint() if lint else None
        self.transport, self.ioeventfd, self.indirect, self.packed = transport, ioeventfd, indirect, packed
        self.border = memory // 2
        """Where the first region ends and the second begins."""
        self.high = max(self.HIGH, memory)
        """Where the third region starts."""
        self.ram = [(0, self.border), (self.border, memory // 4), (self.high, memory // 4)]
        self.memory = GuestMemory.allocate(self.ram)
        self.heap = Heap(0x1000, self.border)
        self.windows = {
            "pio": Heap(IO_WINDOW.start, IO_WINDOW.stop, align=1 << 16),
            "mmio": Heap(MEMORY_WINDOW.start, MEMORY_WINDOW.stop, align=1 << 32),
        }
        self.accel = Traced(self.memory) if trace else InProcess(self.memory)
        self.bus = PciBus()
        self.accel.bus = self.bus
        # Without its busy wait the thread looks at a ring after a kick only, so tests can count.
        self.iothread = IoThread("test", poll_max_ns=0)
        self.raw = RawBus(self)
        self.drivers: list[Driver] = []
        self._messages = 0

    def plug(
        self,
        device: Device,
        *,
        transport: Transport | None = None,
        features: int = ~0,
        queue_size: int | None = None,
        msix: bool = True,
        indirect: bool | None = None,
        start: bool = True,
        **properties: Any,
    ) -> VirtioDriver:
        """Plug a device and bring its driver up to DRIVER_OK; over vhost-user until its queues run.

        `features` masks what is accepted, `queue_size` is the driver's choice for every ring, without `msix` it uses
        INTx, `indirect` is its way to place buffers; with `start=False` it has only found the device. The other
        keywords are properties of virtio-pci; of these vhost-user knows `name`, `event_idx`, `indirect_desc`, `packed`,
        `in_order` and `ring_reset`; it returns a `VhostUserDriver`: the same but for `pci`, `common` and `status`.
        """
        properties.setdefault("name", f"{type(device).__name__.lower()}{len(self.drivers)}")
        properties.setdefault("packed", self.packed)
        driver: Driver
        transport = transport or self.transport
        if transport == "vhost-user":
            if self.lint:
                self.lint.watch(device, properties["name"])
            driver = VhostUserDriver(self, device, **properties)
        else:
            driver = self._plug_pci(device, transport, **{"ioeventfd": self.ioeventfd, **properties})
            driver.msix_wanted = msix
        driver.features_wanted, driver.queue_size = features, queue_size
        driver.indirect = self.indirect if indirect is None else indirect
        self.drivers.append(driver)
        if start:
            driver.start()
        # A test that runs over every transport uses what both have; a type for that would be in the way of all others.
        return cast(VirtioDriver, driver)

    def _plug_pci(self, device: Device, interface: Interface, **properties: Any) -> VirtioDriver:
        slot = min(set(range(1, 32)) - set(self.bus.functions))
        make = self.lint.virtio_pci if self.lint else VirtioPci
        function = make(device, self.accel, iothread=self.iothread, slot=slot, **properties)
        self.bus.add(function)
        return VirtioDriver(self, function, interface)

    def unplug(self, driver: Driver) -> None:
        self.drivers.remove(driver)
        driver.unplug()

    def close(self) -> None:
        """Unplug everything and end the I/O thread."""
        while self.drivers:
            self.unplug(self.drivers[-1])
        self.iothread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def message(self) -> tuple[int, int]:
        """An MSI address and data that nobody uses yet."""
        self._messages += 1
        return MSI_ADDRESS, 0x4000 + self._messages

    @contextmanager
    def only_writes(self, *ranges: Range) -> Iterator[None]:
        """Fail if any guest memory outside the ranges changes in the block."""
        before = snapshot(self.memory)
        yield
        after = snapshot(self.memory)
        for page in before.keys() | after.keys():
            old, new = before.get(page, ZEROES), after.get(page, ZEROES)
            if old != new:
                _compare(page, old, new, ranges)


def snapshot(memory: GuestMemory) -> dict[int, bytes]:
    """The pages of guest RAM that have ever been touched, by address; the others are zero."""
    pages = {}
    for start, size, fd, offset in memory.regions:
        at, end = offset, offset + size
        while at < end and (at := _seek(fd, at, os.SEEK_DATA, end)) < end:
            hole = _seek(fd, at, os.SEEK_HOLE, end)
            data = memory.read(start + at - offset, hole - at)
            pages.update({start + at - offset + n: data[n : n + PAGE] for n in range(0, len(data), PAGE)})
            at = hole
    return pages


def _seek(fd: int, at: int, whence: int, end: int) -> int:
    """Where the next data or hole of a memory file starts, but no further than `end`."""
    try:
        return min(os.lseek(fd, at, whence), end)
    except OSError as error:
        if error.errno != errno.ENXIO:  # no data up to the end of the file
            raise
        return end


def _compare(page: int, old: bytes, new: bytes, ranges: tuple[Range, ...]) -> None:
    """`AssertionError` if two states of a page differ outside the ranges."""
    before, after = bytearray(old), bytearray(new)
    for address, length in ranges:
        low, high = max(address - page, 0), min(address + length - page, PAGE)
        if low < high:
            before[low:high] = after[low:high] = bytes(high - low)
    if before != after:
        at = next(n for n, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
        raise AssertionError(f"guest memory at {page + at:#x} changed from {before[at]:#x} to {after[at]:#x}")
