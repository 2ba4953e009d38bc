"""The registers of the legacy interface, in I/O space (virtio 1.3, 4.1.4.10; ring layout 2.7.2)."""

import struct
from collections.abc import Callable
from functools import partial

from pyvirtio.device import Device
from pyvirtio.transports.base import DriverState
from pyvirtio.transports.pci_interrupts import Interrupts

HEADER = struct.Struct("<IIIHHHBB")
VECTORS = struct.Struct("<HH")
NOTIFY = 16
ISR = 19
PAGE = 4096


def register_file_size(device: Device) -> int:
    """Bytes of I/O space, a power of two."""
    used = HEADER.size + VECTORS.size + len(device.config_bytes())
    return 1 << (used - 1).bit_length()


class LegacyRegisters:
    """The header, and behind it the configuration of the device. A write to the header has to be one register.

    The notify register is the transport's business. The transport serialises writes.
    """

    def __init__(self, driver: DriverState, interrupts: Interrupts) -> None:
        self.driver = driver
        self.interrupts = interrupts
        self._writers: dict[tuple[int, int], Callable[[int], None]] = {
            (4, 4): driver.write_legacy_features,
            (8, 4): self._set_page,
            (14, 2): self._select_queue,
            (18, 1): partial(driver.write_status, legacy=True),
        }
        self._vector_writers: dict[tuple[int, int], Callable[[int], None]] = {
            (20, 2): interrupts.set_config_vector,
            (22, 2): self._set_vector,
        }

    @property
    def config_offset(self) -> int:
        """The vector registers exist only while MSI-X is enabled."""
        return HEADER.size + (VECTORS.size if self.interrupts.msix_enabled else 0)

    def read(self, offset: int, size: int) -> int:
        if offset == ISR:
            return self.interrupts.isr.read()
        data = self._header() + self.driver.read_config()
        return int.from_bytes(data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        config = offset - self.config_offset
        if config >= 0:
            self.driver.write_config(config, size, value)
            return
        writer = self._writers.get((offset, size))
        if writer is None and self.interrupts.msix_enabled:
            writer = self._vector_writers.get((offset, size))
        if writer is not None:
            writer(value)

    def _header(self) -> bytes:
        driver, select = self.driver, self.driver.queue_select
        setup = driver.setup(select)
        header = HEADER.pack(
            driver.legacy_offered,
            driver.driver_features & 0xFFFFFFFF,
            setup.desc // PAGE & 0xFFFFFFFF if setup else 0,
            setup.size if setup else 0,
            select,
            0,
            driver.status,
            0,
        )
        if not self.interrupts.msix_enabled:
            return header
        vector = self.interrupts.queue_vectors[select] if setup else 0
        return header + VECTORS.pack(self.interrupts.config_vector, vector)

    def _select_queue(self, value: int) -> None:
        self.driver.queue_select = value

    def _set_vector(self, value: int) -> None:
        if self.driver.setup(self.driver.queue_select):
            self.interrupts.set_queue_vector(self.driver.queue_select, value)

    def _set_page(self, page: int) -> None:
        """QUEUE_PFN: where all three parts of the ring start, in pages of 4096 bytes; 0 gives the ring up."""
        if not page:
            self.driver.stop_legacy_queue()
        elif setup := self.driver.configurable:
            setup.desc = page * PAGE
            setup.avail = setup.desc + 16 * setup.size
            end = setup.avail + 6 + 2 * setup.size
            setup.used = (end + PAGE - 1) // PAGE * PAGE
            self.driver.start_legacy_queue(setup)
