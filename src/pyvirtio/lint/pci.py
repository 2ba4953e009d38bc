"""A virtio-pci function under the lint: its registers are watched where accesses reach the device."""

from typing import Any

from pyvirtio.device import Device
from pyvirtio.lint.registers import ModernRegisters
from pyvirtio.lint.report import Report
from pyvirtio.lint.rings import Rings
from pyvirtio.spec import Status
from pyvirtio.transports.base import Accelerator
from pyvirtio.transports.pci import DEVICE_REGION, ISR_REGION, LEGACY_BAR, MODERN_BAR, NOTIFY_REGION, VirtioPci

LEGACY_STATUS = 18


class LintedPci(VirtioPci):
    """Tells the lint of each access before it does it, and of what a read returned.

    Notifies that KVM turns into eventfds do not come by; the rings' watchers count them.
    """

    def __init__(self, device: Device, accel: Accelerator, *, rings: Rings, report: Report, **properties: Any) -> None:
        super().__init__(device, accel, **properties)
        self.rings = rings
        self.registers = ModernRegisters(self, rings, report)

    def bar_read(self, bar: int, offset: int, size: int) -> int:
        value = super().bar_read(bar, offset, size)
        if bar == MODERN_BAR and offset < ISR_REGION:
            self.registers.read(offset, size, value)
        elif bar == MODERN_BAR and ISR_REGION <= offset < DEVICE_REGION:
            self.registers.read_isr(msix=self.interrupts.msix_enabled)
        elif bar == MODERN_BAR and DEVICE_REGION <= offset < NOTIFY_REGION:
            self.registers.read_config(offset - DEVICE_REGION, size)
        return value

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        queue = self._notified_queue(bar, offset, value)
        if queue is not None:
            self.registers.notified(queue, legacy=bar == LEGACY_BAR)
        elif bar == MODERN_BAR and offset < ISR_REGION:
            self.registers.write(offset, size, value)
        elif bar == MODERN_BAR and DEVICE_REGION <= offset < NOTIFY_REGION:
            self.registers.write_config(offset - DEVICE_REGION, size)
        elif (bar, offset) == (LEGACY_BAR, LEGACY_STATUS):
            self._legacy_status(value)
        super().bar_write(bar, offset, size, value)
        if queue is not None:
            self.rings.served(queue)

    def reset(self) -> None:
        super().reset()
        self.registers.forget()

    def _legacy_status(self, value: int) -> None:
        """A legacy driver may be served before DRIVER_OK, and its rings are all that is looked at."""
        if value and (cleared := self.driver.status & ~Status(value) & ~Status.NEEDS_RESET):
            self.rings.violation("driver", "2.1.1", f"cleared status bits {cleared!r}")
