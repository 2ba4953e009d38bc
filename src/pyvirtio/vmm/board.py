"""What a machine has besides its CPUs: memory, I/O threads and devices on a PCI bus."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

from pyvirtio._core import GuestMemory
from pyvirtio.dataplane import IoThread
from pyvirtio.device import Device
from pyvirtio.errors import ConfigError
from pyvirtio.transports.base import Accelerator
from pyvirtio.transports.pci import VirtioPci
from pyvirtio.vmm import layout
from pyvirtio.vmm.layout import GIB, MIB
from pyvirtio.vmm.pci_bus import SLOTS, HostBridge, PciBus

MIN_MEMORY, MAX_MEMORY = 16 * MIB, 1024 * GIB
DEFAULT_IOTHREAD = "iothread"


def allocate(size: int) -> GuestMemory:
    """The RAM of a machine, `size` bytes."""
    if not MIN_MEMORY <= size <= MAX_MEMORY or size % MIB:
        raise ConfigError(
            f"memory of {size} bytes: allowed are whole MiB from {MIN_MEMORY // MIB} MiB to {MAX_MEMORY // GIB} GiB"
        )
    try:
        return GuestMemory.allocate(layout.ram_ranges(size))
    except OSError as error:
        raise ConfigError(f"memory of {size // MIB} MiB: {error.strerror}") from None


class Board:
    """Devices plugged into an accelerator. A context manager: leaving it closes devices and I/O threads.

    Also what `--dry-run` builds, without KVM. Devices are added before the machine runs.
    """

    def __init__(self, accel: Accelerator) -> None:
        self.accel = accel
        self.devices: list[VirtioPci] = []
        self.virtio_pci: Callable[..., VirtioPci] = VirtioPci
        """What makes a function of a device."""
        self.iothreads: dict[str, IoThread] = {}
        self.pci = PciBus([HostBridge()])
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closing.close()

    def on_close(self, callback: Callable[[], object]) -> None:
        """What the board closes with itself, last first."""
        self._closing.callback(callback)

    def add_iothread(self, name: str, **options: int) -> IoThread:
        """A further I/O thread; `options` are `poll_max_ns`, `poll_grow` and `poll_shrink`."""
        iothread = IoThread(name, **options)
        self.on_close(iothread.close)
        self.iothreads[name] = iothread
        return iothread

    @property
    def iothread(self) -> IoThread:
        """The I/O thread of all devices that name no other."""
        return self.iothreads.get(DEFAULT_IOTHREAD) or self.add_iothread(DEFAULT_IOTHREAD)

    def add(self, device: Device, name: str, **pci: Any) -> VirtioPci:
        """Plug a device; `pci` are the properties of `VirtioPci`. The board closes it in the end."""
        if any(function.name == name for function in self.devices):
            raise ConfigError(f"{name}: a device of that name is plugged already; names are unique")
        if "slot" not in pci:
            pci["slot"] = self.free_slot(name)
        if "iothread" not in pci:
            pci["iothread"] = self.iothread
        with ExitStack() as undo:
            undo.callback(device.close)
            function = self.virtio_pci(device, self.accel, name=name, **pci)
            self.pci.add(function)
            undo.pop_all()
        self.on_close(function.close)
        self.devices.append(function)
        return function

    def free_slot(self, name: str) -> int:
        """The first slot without a function, for the device `name`."""
        for slot in range(SLOTS):
            if slot not in self.pci.functions:
                return slot
        raise ConfigError(f"pci: no free slot for {name}: a bus has {SLOTS - 1}")
