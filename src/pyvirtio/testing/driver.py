"""The driver of a virtio-pci device in a `Guest`: what a kernel's driver does, step by step."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

from pyvirtio._core import GuestMemory
from pyvirtio.dataplane import owed
from pyvirtio.device import Device
from pyvirtio.errors import ConfigError
from pyvirtio.spec import NO_VECTOR, Feature, Status
from pyvirtio.testing.heap import Heap
from pyvirtio.testing.pci import MSIX, Msix, Pci, Window
from pyvirtio.testing.queue import (
    HANG,
    DeviceNeedsReset,
    Interrupts,
    Intx,
    Msi,
    Queue,
    Ring,
    make_ring,
    queue_named,
    sleep_on,
)
from pyvirtio.testing.registers import Legacy, Modern, config_layout
from pyvirtio.transports.pci import VirtioPci
from pyvirtio.vmm.snapshot import decode, encode

if TYPE_CHECKING:
    from pyvirtio.testing.machine import Guest

Interface = Literal["modern", "legacy"]


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
        layout = config_layout(self.function.device)
        if self.transport == "modern":
            return Modern(self.pci, layout)
        if 0 not in self.pci.bars:
            raise ConfigError(f"{self.name}: no legacy interface: device type {self.function.device.id} has none")
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

    def owed(self, index: int) -> str:
        return owed(self.function.dataplane.queues[index])

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
        if self.common.config_msix_vector == NO_VECTOR:
            raise AssertionError(f"{self.name}: no vector for the configuration")
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

    def reset_queue(self, index: int) -> None:
        """Reset one queue while the others go on (2.6.1); its buffers are the driver's again."""
        self.common.queue_select = index
        self.common.queue_reset = 1
        deadline = time.monotonic() + HANG
        while self.common.queue_reset or self.common.queue_enable:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: {HANG} s passed before queue {index} was reset")
        self.queues[index].free()

    def renew_queue(self, index: int) -> Queue:
        """Set a queue up again that was reset, with a new ring of `queue_size` entries and its old vector."""
        old = self.queues[index]
        if self.msix and self.msix_wanted:
            self.registers.set_queue_vector(index, min(1 + index, self.msix.count - 1))
        self.queues[index] = self.set_up_queue(index, old.name, old.source)
        return self.queues[index]

    def make_ring(self, size: int) -> Ring:
        return make_ring(self.memory, self.heap, size, self.features)

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

    def save(self) -> dict[str, Any]:
        """The state of the device, as a snapshot of the machine has it; from here on it is held, for `restore`."""
        dataplane = self.function.dataplane
        dataplane.notifiers.hold()
        dataplane.drain()
        return decode(encode(self.function.save()))

    def restore(self, device: Device, state: dict[str, Any], **properties: Any) -> None:
        """Put another device in the place of this one, with its state; the driver goes on and notices nothing.

        That is what happens to a device when its machine goes on from a snapshot. `properties` are those of `plug`.
        """
        old = self.function
        self.guest.bus.remove(old)
        old.close()
        offered = {"packed": Feature.RING_PACKED, "in_order": Feature.IN_ORDER}
        properties = {name: bool(old.driver.offered & bit) for name, bit in offered.items()} | properties
        properties.setdefault("ioeventfd", not old.ioeventfd)  # the state has the last word
        self.function = VirtioPci(
            device, self.guest.accel, name=old.name, iothread=self.guest.iothread, slot=old.slot, **properties
        )
        self.guest.bus.add(self.function)
        self.function.dataplane.notifiers.hold()
        self.function.restore(state)
        self.function.dataplane.notifiers.unhold()

    def unplug(self) -> None:
        """What is left to `Guest.unplug`: take the function from the bus and close it."""
        for index, window in self.pci.bars.items():
            self.guest.windows[window.space].free(window.base, self.pci.sizes[index])
        self.guest.bus.remove(self.function)
        self.function.close()

    def take_interrupts(self, only: Interrupts | None = None) -> bool:
        """Handle the interrupts that have arrived, or those of one source; return whether there were any."""
        sources = (only,) if only else dict.fromkeys([self.config_source, *[queue.source for queue in self.queues]])
        taken = [source for source in sources if source.take()]
        for queue in self.queues if taken else ():
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
