"""One machine in one process: guest RAM, a PCI bus, an I/O thread, and a driver that obeys virtio unless told not to.

No KVM and no kernel: the in-process accelerator plays the vCPU's side, all the rest is what a real machine runs.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

from pyvirtio._core import GuestMemory
from pyvirtio.accel.inproc import InProcess
from pyvirtio.dataplane import IoThread
from pyvirtio.device import Device
from pyvirtio.spec import Feature, Status
from pyvirtio.testing.heap import Heap
from pyvirtio.testing.pci import MSIX, Msix, Pci, Window
from pyvirtio.testing.queue import HANG, DeviceNeedsReset, Interrupts, Intx, Msi, Queue, Range, queue_named, sleep_on
from pyvirtio.testing.registers import Legacy, Modern
from pyvirtio.testing.ring import SplitRing
from pyvirtio.transports.pci import VirtioPci
from pyvirtio.vmm.pci_bus import IO_WINDOW, MEMORY_WINDOW, PciBus

MIB = 1 << 20
MSI_ADDRESS = 0xFEE00000
PAGE = 4096
ZEROES = bytes(PAGE)

Interface = Literal["modern", "legacy"]


class Guest:
    """A machine to plug devices into. RAM is two adjacent regions from 0 on and, behind a hole, a third above 4 GiB.

    `ioeventfd` is what `plug` asks for unless it is told; None leaves it to the device.
    """

    HIGH = 1 << 32
    """Where the third region starts at the lowest."""

    def __init__(self, *, ioeventfd: bool | None = None, memory: int = 4 * MIB) -> None:
        self.ioeventfd = ioeventfd
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
        self.accel = InProcess(self.memory)
        self.bus = PciBus()
        self.accel.bus = self.bus
        # Without its busy wait the thread looks at a ring after a kick only, so tests can count.
        self.iothread = IoThread("test", poll_max_ns=0)
        self.drivers: list[VirtioDriver] = []
        self._messages = 0

    def plug(
        self,
        device: Device,
        *,
        transport: Interface = "modern",
        features: int = ~0,
        queue_size: int | None = None,
        msix: bool = True,
        indirect: bool = False,
        start: bool = True,
        **properties: Any,
    ) -> VirtioDriver:
        """Plug a device and bring its driver up to DRIVER_OK.

        `features` masks what is accepted, `queue_size` is the driver's choice for every ring, without `msix` it uses
        INTx, `indirect` is its way to place buffers; with `start=False` it has only found the device. The other
        keywords are properties of virtio-pci.
        """
        properties.setdefault("ioeventfd", self.ioeventfd)
        properties.setdefault("name", f"{type(device).__name__.lower()}{len(self.drivers)}")
        slot = min(set(range(1, 32)) - set(self.bus.functions))
        function = VirtioPci(device, self.accel, iothread=self.iothread, slot=slot, **properties)
        self.bus.add(function)
        driver = VirtioDriver(self, function, transport)
        driver.features_wanted, driver.queue_size, driver.msix_wanted = features, queue_size, msix
        driver.indirect = indirect
        self.drivers.append(driver)
        if start:
            driver.start()
        return driver

    def unplug(self, driver: VirtioDriver) -> None:
        self.drivers.remove(driver)
        for index, window in driver.pci.bars.items():
            self.windows[window.space].free(window.base, driver.pci.sizes[index])
        self.bus.remove(driver.function)
        driver.function.close()

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


class VirtioDriver:
    """The driver of one device: `start` does what a driver's probe does, one attribute per queue does the I/O.

    A device with several queues of a kind has a list: `blk.requestq[1]`. `common` and `config` are the registers by
    name, `pci` is configuration space; `function` is the device's side.
    """

    def __init__(self, guest: Guest, function: VirtioPci, transport: Interface) -> None:
        self.guest, self.function, self.transport = guest, function, transport
        self.name = function.name
        self.pci = Pci(guest.accel, function.slot, lambda space, size: guest.windows[space].allocate(size))
        self.features = 0
        self.features_wanted = ~0
        self.queue_size: int | None = None
        self.msix_wanted = True
        self.indirect = False
        self.queues: list[Queue] = []
        self.notifiers: list[tuple[Window, int]] = []
        self.may_break = False
        """Whether DEVICE_NEEDS_RESET is what the test is after."""
        offset = self.pci.capability(MSIX)
        self.msix = Msix(self.pci, offset) if offset is not None else None
        self.registers = self._find_registers()
        self.config_source: Interrupts = self._intx()

    def _find_registers(self) -> Modern | Legacy:
        layout_of = self.function.device.config_layout
        names = [field[0] for field in layout_of._fields_] if layout_of else []
        layout = {name: (getattr(layout_of, name).offset, getattr(layout_of, name).size) for name in names}
        if self.transport == "modern":
            return Modern(self.pci, layout)
        return Legacy(self.pci, layout, msix=False)

    def __getattr__(self, name: str) -> Any:
        return queue_named(self.__dict__.get("queues", []), name)

    @property
    def memory(self) -> GuestMemory:
        return self.guest.memory

    @property
    def heap(self) -> Heap:
        return self.guest.heap

    def notify(self, index: int, size: int) -> None:
        """What a vCPU does for `Queue.notify`."""
        window, offset = self.notifiers[index]
        window.write(offset, size, index)

    def held(self, index: int) -> int:
        return self.function.dataplane.queues[index].in_flight

    @property
    def common(self) -> Any:
        return self.registers.common

    @property
    def config(self) -> Any:
        return self.registers.config

    @property
    def status(self) -> Status:
        return Status(self.common.device_status)

    @status.setter
    def status(self, value: int) -> None:
        self.common.device_status = value

    def start(self) -> None:
        """All that a driver's probe does (virtio 1.3, 3.1.1)."""
        self.negotiate()
        self.set_up()
        self.status |= Status.DRIVER_OK

    def negotiate(self) -> None:
        """Reset, then agree on the features."""
        self.reset()
        self.status = Status.ACKNOWLEDGE
        self.status |= Status.DRIVER
        self.features = self.registers.offered() & self.features_wanted
        self.registers.accept(self.features)
        if self.transport == "modern":
            self.status |= Status.FEATURES_OK
            if Status.FEATURES_OK not in self.status:
                raise AssertionError(f"{self.name}: features {self.features:#x} refused")

    def set_up(self) -> None:
        """Interrupts, then every queue that the device has."""
        sources = self._set_up_msix() if self.msix and self.msix_wanted else None
        if sources is None:
            self.config_source = self._intx()
        for index, vq in enumerate(self.function.dataplane.queues):
            source = sources[min(1 + index, len(sources) - 1)] if sources else self.config_source
            self.queues.append(self.set_up_queue(index, vq.name, source))
            self.notifiers.append(self.registers.notifier(index))

    def _set_up_msix(self) -> list[Msi]:
        """Entry 0 is for the configuration, the others for the queues, which share the last if there are too few."""
        assert self.msix is not None
        sources = []
        for entry in range(min(self.msix.count, 1 + len(self.function.dataplane.queues))):
            message = self.guest.message()
            self.msix.set_message(entry, *message)
            self.msix.mask(entry, False)
            sources.append(Msi(self.guest.accel, *message))
        self.msix.control = Msix.ENABLE
        if isinstance(self.registers, Legacy):
            self.registers = Legacy(self.pci, self.registers.config.layout, msix=True)
        self.common.config_msix_vector = 0
        for index in range(len(self.function.dataplane.queues)):
            self.registers.set_queue_vector(index, min(1 + index, len(sources) - 1))
        self.config_source = sources[0]
        return sources

    def set_up_queue(self, index: int, name: str, source: Interrupts) -> Queue:
        """Give the device a ring in fresh memory."""
        size = self.registers.queue_size(index)
        if self.queue_size:
            size = self.registers.set_queue_size(index, self.queue_size)
        queue = Queue(self, index, name, self.make_ring(size), source)
        queue.indirect = self.indirect and bool(self.features & Feature.INDIRECT_DESC)
        self.registers.enable_queue(index, queue.ring)
        return queue

    def make_ring(self, size: int) -> SplitRing:
        return SplitRing.allocate(self.memory, self.heap, size, event_idx=bool(self.features & Feature.EVENT_IDX))

    def _intx(self) -> Intx:
        return Intx(self.guest.accel.lines[self.pci.slot], lambda: self.registers.read_isr())

    def reset(self) -> None:
        """Write 0 to the status and read it until it is 0 (4.1.4.3.2); the queues are gone."""
        self.status = Status(0)
        deadline = time.monotonic() + HANG
        while self.status:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: {HANG} s passed before the reset was done")
        while self.queues:
            self.queues.pop().free()
        self.notifiers.clear()
        self.may_break = False

    def take_interrupts(self) -> bool:
        """Handle the interrupts that have arrived; return whether there were any."""
        sources = {id(source): source for source in (self.config_source, *(queue.source for queue in self.queues))}
        taken = [source for source in sources.values() if source.take()]
        for queue in self.queues:
            if queue.source in taken:
                queue.collect()
        return bool(taken)

    @property
    def config_interrupts(self) -> int:
        self.take_interrupts()
        return self.config_source.config_count

    def check(self) -> None:
        """Raise `DeviceNeedsReset` if the device says so."""
        if Status.NEEDS_RESET in self.status:
            raise DeviceNeedsReset(f"{self.name}: {self.why_broken}")

    @property
    def why_broken(self) -> str | None:
        """The reason that the device logged when it asked for a reset."""
        return self.function.dataplane.state.broken

    def wait_needs_reset(self, timeout: float = HANG) -> str:
        """Sleep until a configuration interrupt tells of DEVICE_NEEDS_RESET; return the reason."""
        self.may_break = True
        deadline = time.monotonic() + timeout
        while not self.config_interrupts or Status.NEEDS_RESET not in self.status:
            if not sleep_on(self.config_source.fds(), deadline - time.monotonic()):
                raise TimeoutError(f"{self.name}: {timeout} s passed before it needs a reset; status {self.status!r}")
        return self.why_broken or ""
