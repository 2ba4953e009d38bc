"""The machine below its drivers, for other driver suites to be mounted on: all that a guest's CPU and its user can do.

`guest.plug(device, start=False)` puts a device on the bus with its BARs placed and nothing else done; what a suite
written for QEMU's qtest or for a guest of its own asks of the platform is here, one method for each thing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.pci import CONFIG_ADDRESS, CONFIG_DATA
from pyvirtio.testing.queue import sleep_on

if TYPE_CHECKING:
    from pyvirtio.testing.machine import Guest


class RawBus:
    """Accesses of any width as a vCPU makes them, guest memory, interrupts, and what a user does to the machine.

    Nothing is remembered between calls; any thread. An address that nobody answers reads as all ones.
    """

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    @property
    def slots(self) -> list[int]:
        """Where there is a PCI function, on bus 0."""
        return sorted(self.guest.bus.functions)

    def config_read(self, slot: int, offset: int, size: int) -> int:
        """Configuration space through ports 0xCF8 and 0xCFC; an access may not cross a multiple of 4."""
        self._select(slot, offset)
        return self.pio_read(CONFIG_DATA + offset % 4, size)

    def config_write(self, slot: int, offset: int, size: int, value: int) -> None:
        self._select(slot, offset)
        self.pio_write(CONFIG_DATA + offset % 4, size, value)

    def _select(self, slot: int, offset: int) -> None:
        self.pio_write(CONFIG_ADDRESS, 4, 1 << 31 | slot << 11 | offset & 0xFC)

    def pio_read(self, port: int, size: int) -> int:
        return self.guest.accel.pio_read(port, size)

    def pio_write(self, port: int, size: int, value: int) -> None:
        self.guest.accel.pio_write(port, size, value)

    def mmio_read(self, address: int, size: int) -> int:
        return self.guest.accel.mmio_read(address, size)

    def mmio_write(self, address: int, size: int, value: int) -> None:
        self.guest.accel.mmio_write(address, size, value)

    @property
    def ram(self) -> list[tuple[int, int]]:
        """(address, bytes) of each region of guest RAM. The drivers of the machine use what lies below its first end
        and above 0x1000, from the bottom up."""
        return list(self.guest.ram)

    def memory_read(self, address: int, length: int) -> bytes:
        return self.guest.memory.read(address, length)

    def memory_write(self, address: int, data: bytes) -> None:
        self.guest.memory.write(address, data)

    def intx(self, slot: int) -> bool:
        """The level of the line that INTA of a slot is wired to."""
        return self.guest.accel.lines[slot].level

    def messages(self, timeout: float = 0.0) -> list[tuple[int, int]]:
        """Address and data of the MSI messages since the last call; waits up to `timeout` seconds for the first."""
        vectors = list(self.guest.accel.routes.items())
        sleep_on([vector.fd for vector, _ in vectors], timeout)
        return [message for vector, message in vectors if sleep_on([vector.fd], 0) and os.eventfd_read(vector.fd)]

    def system_reset(self) -> None:
        """The machine's reset line: every function forgets its driver, its BARs and its interrupts."""
        self.guest.bus.reset()

    def unplug(self, slot: int) -> None:
        """Take a function off the bus and close its device."""
        driver = next(one for one in self.guest.drivers if isinstance(one, VirtioDriver) and one.pci.slot == slot)
        self.guest.unplug(driver)
