"""What a driver may do with the registers of a modern virtio-pci device, and when (virtio 1.3, 3.1.1 and 4.1.4.3.2)."""

from __future__ import annotations

from ctypes import sizeof
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from pyvirtio.lint.report import Report, Violation
from pyvirtio.lint.rings import Rings
from pyvirtio.spec import NO_VECTOR, Feature, Status
from pyvirtio.transports import pci_modern

if TYPE_CHECKING:
    from pyvirtio.lint.pci import LintedPci

INIT, COMMON = "3.1.1", "4.1.4.3.2"
STEPS = [Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK]
"""The order in which a driver sets the bits of the status."""


class Register(NamedTuple):
    """A register of the common configuration structure."""

    name: str
    offset: int
    size: int
    writable: bool = True


REGISTERS = [
    Register("device_feature_select", 0, 4),
    Register("device_feature", 4, 4, writable=False),
    Register("driver_feature_select", 8, 4),
    Register("driver_feature", 12, 4),
    Register("config_msix_vector", 16, 2),
    Register("num_queues", 18, 2, writable=False),
    Register("device_status", 20, 1),
    Register("config_generation", 21, 1, writable=False),
    Register("queue_select", 22, 2),
    Register("queue_size", 24, 2),
    Register("queue_msix_vector", 26, 2),
    Register("queue_enable", 28, 2),
    Register("queue_notify_off", 30, 2, writable=False),
    Register("queue_desc", 32, 8),
    Register("queue_driver", 40, 8),
    Register("queue_device", 48, 8),
    Register("queue_notify_config_data", 56, 2, writable=False),
    Register("queue_reset", 58, 2),
]
QUEUE_FIELDS = {"queue_size", "queue_msix_vector", "queue_desc", "queue_driver", "queue_device"}


def _accessed(offset: int, size: int) -> Register | None:
    """The register that an access is one of, or half of if it has 8 bytes."""
    for register in REGISTERS:
        halves = {(register.offset, 4), (register.offset + 4, 4)} if register.size == 8 else set()
        if (offset, size) in halves | {(register.offset, min(register.size, 4))}:
            return register
    return None


class ModernRegisters:
    """Follows the initialisation of one device. Accesses are told before they are done, reads after."""

    def __init__(self, function: LintedPci, rings: Rings, report: Report) -> None:
        self.function, self.rings, self.report = function, rings, report
        self.forget()

    def forget(self) -> None:
        """The device was reset: the driver starts over."""
        self.resetting = False
        self.features_read_back = False
        self.vectors_unread: set[str] = set()
        self.rings.live = None

    @property
    def status(self) -> Status:
        """Before the access."""
        return self.function.driver.status

    def read(self, offset: int, size: int, value: int) -> None:
        register = self._natural(offset, size)
        if register is None:
            return
        if register.name == "device_status":
            self.resetting = self.resetting and value != 0
            self.features_read_back |= bool(value & Status.FEATURES_OK)
        elif register.name.endswith("msix_vector"):
            self.vectors_unread.discard(self._vector_name(register))
        elif register.name == "device_feature" and not self.status & Status.DRIVER:
            self._driver(INIT, "read the features before the DRIVER status bit was set")

    def write(self, offset: int, size: int, value: int) -> None:
        register = self._natural(offset, size)
        if register is None:
            return
        if not register.writable:
            self._driver(COMMON, f"wrote to {register.name}")
        elif register.name == "device_status":
            self._write_status(Status(value))
        elif register.name == "driver_feature":
            self._write_features(value)
        elif register.name.startswith("queue_") and register.name != "queue_select":
            self._write_queue(register, value)
        if register.name.endswith("msix_vector") and value != NO_VECTOR:
            self.vectors_unread.add(self._vector_name(register))

    def read_config(self, offset: int, size: int) -> None:
        if not self.status & Status.DRIVER:
            self._driver(INIT, "read the device's configuration before the DRIVER status bit was set")
        self._natural_config(offset, size)

    def write_config(self, offset: int, size: int) -> None:
        if not self.status & Status.FEATURES_OK:
            self._driver(INIT, "wrote to the device's configuration before FEATURES_OK")
        self._natural_config(offset, size)

    def read_isr(self, *, msix: bool) -> None:
        if msix:
            self._driver("4.1.4.5.2", "read the ISR status although MSI-X is enabled")

    def notified(self, index: int, *, legacy: bool) -> None:
        """The queue is told of before; a legacy driver may notify before DRIVER_OK."""
        setup = self.function.driver.setup(index)
        if not legacy and not self.status & Status.DRIVER_OK:
            self._driver(INIT, f"notified queue {index} before DRIVER_OK")
        elif setup is None or not setup.enabled:
            self._driver("2.9", f"notified queue {index}, which is not enabled")
        else:
            self.rings.notified(index)

    # Initialisation

    def _write_status(self, new: Status) -> None:
        if not new:
            self.forget()
            self.resetting = True
            return
        if self.resetting:
            self._driver(COMMON, "wrote to device_status before it had read 0 after a reset")
            self.resetting = False
        if cleared := self.status & ~new & ~Status.NEEDS_RESET:
            self._driver("2.1.1", f"cleared status bits {cleared!r}")
        added = new & ~self.status
        if added and Status.FAILED in self.status:
            self._driver("2.1.1", f"went on to {added!r} after FAILED without a reset")
        for before, step in pairwise(STEPS):
            if step in added and before not in new:
                self._driver(INIT, f"set {step!r} without {before!r}")
        if Status.FEATURES_OK in added:
            self._check_features()
        if Status.DRIVER_OK in added:
            self._check_driver_ok()
        self.rings.live = Status.DRIVER_OK in new

    def _check_features(self) -> None:
        driver = self.function.driver
        if driver.offered & ~driver.driver_features & Feature.VERSION_1:
            self._driver("6.1", "VIRTIO_F_VERSION_1 was offered and not accepted")

    def _check_driver_ok(self) -> None:
        if not self.features_read_back:
            self._driver(INIT, "set DRIVER_OK without having read FEATURES_OK back")
        for vector in sorted(self.vectors_unread):
            self._driver("4.1.5.1.2.2", f"did not read {vector} back after it had written it")

    def _write_features(self, value: int) -> None:
        driver = self.function.driver
        if not self.status & Status.DRIVER:
            self._driver(INIT, "wrote features before the DRIVER status bit was set")
        if self.status & Status.FEATURES_OK:
            self._driver(INIT, "wrote features after FEATURES_OK")
        select = driver.driver_feature_select
        offered = driver.offered >> 32 * select & 0xFFFFFFFF if select < 2 else 0
        if unoffered := value & ~offered:
            self._driver("2.2.1", f"accepted features of word {select} that were not offered: {unoffered:#x}")

    def _write_queue(self, register: Register, value: int) -> None:
        driver = self.function.driver
        index, setup = driver.queue_select, driver.setup(driver.queue_select)
        if setup is None:
            self._driver(COMMON, f"wrote to {register.name} of queue {index}, which does not exist")
            return
        if register.name in ("queue_enable", "queue_reset") and value != 1:
            self._driver(COMMON, f"wrote {value} to {register.name} of queue {index}")
        if register.name == "queue_reset" and not driver.driver_features & Feature.RING_RESET:
            self._driver("2.6.1", f"reset queue {index} without VIRTIO_F_RING_RESET")
        if register.name in QUEUE_FIELDS and setup.enabled:
            self._driver(COMMON, f"wrote to {register.name} of queue {index}, which is enabled")
        unmapped = register.name == "queue_msix_vector" and value == NO_VECTOR  # also when a driver cleans up
        if register.name in QUEUE_FIELDS | {"queue_enable"} and not self.status & Status.FEATURES_OK and not unmapped:
            self._driver(INIT, f"wrote to {register.name} of queue {index} before FEATURES_OK")
        if register.name == "queue_size" and (value & (value - 1) or not value) and not self._packed:
            self._driver(COMMON, f"wrote {value} to queue_size of queue {index}, which is no power of two")

    @property
    def _packed(self) -> bool:
        return bool(self.function.driver.driver_features & Feature.RING_PACKED)

    # Widths

    def _natural(self, offset: int, size: int) -> Register | None:
        """The register of an access; one that is none, or another width, is a violation."""
        register = _accessed(offset, size)
        if register is None and offset < pci_modern.LAYOUT.size:
            self._driver("4.1.3.1", f"accessed {size} bytes at {offset} of the common configuration")
        return register

    def _natural_config(self, offset: int, size: int) -> None:
        layout = self.function.device.config_layout
        if layout is None:
            return
        for name, kind, *_ in layout._fields_:
            field = getattr(layout, name)
            width = min(sizeof(getattr(kind, "_type_", kind)) if hasattr(kind, "_length_") else field.size, 4)
            if field.offset <= offset < field.offset + field.size:
                if size != width or (offset - field.offset) % width:
                    self._driver(
                        "4.1.3.1", f"accessed {size} bytes at {offset} of the configuration, which is in {name}"
                    )
                return

    def _vector_name(self, register: Register) -> str:
        if register.name == "config_msix_vector":
            return register.name
        return f"{register.name} of queue {self.function.driver.queue_select}"

    def _driver(self, section: str, text: str) -> None:
        self.report.add(Violation(self.function.name, "driver", section, text))
