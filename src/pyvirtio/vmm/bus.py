"""Where a vCPU's port and memory accesses go that neither KVM nor an ioeventfd takes."""

from collections.abc import Iterable

from pyvirtio.vmm.pci_bus import PciBus
from pyvirtio.vmm.platform import PortDevice


class SystemBus:
    """Platform devices by port, everything else by the PCI bus, which answers all ones for what nobody claims.

    The object that `_core.Vcpu.run` calls, on the vCPU threads.
    """

    def __init__(self, pci: PciBus, devices: Iterable[PortDevice]) -> None:
        self.pci = pci
        self._ports = {port: device for device in devices for port in device.ports}

    def pio_read(self, port: int, size: int) -> int:
        device = self._ports.get(port)
        return self.pci.pio_read(port, size) if device is None else device.read(port, size)

    def pio_write(self, port: int, size: int, value: int) -> None:
        device = self._ports.get(port)
        if device is None:
            self.pci.pio_write(port, size, value)
        else:
            device.write(port, size, value)

    def mmio_read(self, address: int, size: int) -> int:
        return self.pci.mmio_read(address, size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.pci.mmio_write(address, size, value)
