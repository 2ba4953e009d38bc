"""The common configuration structure of a modern virtio-pci device (virtio 1.3, 4.1.4.3)."""

import struct
from collections.abc import Callable
from functools import partial
from typing import Literal

from pyvirtio.spec import NO_VECTOR, Feature
from pyvirtio.transports.base import DriverState
from pyvirtio.transports.pci_interrupts import Interrupts

LAYOUT = struct.Struct("<IIIIHHBBHHHHHQQQHH")

Ring = Literal["desc", "avail", "used"]


class CommonConfig:
    """The registers. Reads of any width and offset are answered; a write has to be one register or half of a ring
    address, anything else is ignored. The transport serialises writes."""

    def __init__(self, driver: DriverState, interrupts: Interrupts) -> None:
        self.driver = driver
        self.interrupts = interrupts
        self._writers: dict[tuple[int, int], Callable[[int], None]] = {
            (0, 4): self._select_device_features,
            (8, 4): self._select_driver_features,
            (12, 4): driver.write_driver_word,
            (16, 2): interrupts.set_config_vector,
            (20, 1): driver.write_status,
            (22, 2): self._select_queue,
            (24, 2): self._set_size,
            (26, 2): self._set_vector,
            (28, 2): self._enable,
            (58, 2): self._reset_queue,
        }
        rings: tuple[tuple[int, Ring], ...] = ((32, "desc"), (40, "avail"), (48, "used"))
        for offset, ring in rings:
            self._writers[offset, 8] = partial(self._set_address, ring, 0, 64)
            self._writers[offset, 4] = partial(self._set_address, ring, 0, 32)
            self._writers[offset + 4, 4] = partial(self._set_address, ring, 32, 32)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._registers()[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        writer = self._writers.get((offset, size))
        if writer is not None:
            writer(value)

    def _registers(self) -> bytes:
        driver, select = self.driver, self.driver.queue_select
        return LAYOUT.pack(
            driver.device_feature_select,
            driver.offered_word(),
            driver.driver_feature_select,
            driver.driver_word(),
            self.interrupts.config_vector,
            len(driver.setups),
            driver.status,
            driver.dataplane.device.config_generation,
            select,
            *self._queue_registers(select),
            0,  # queue_notif_config_data: NOTIF_CONFIG_DATA is not offered
            0,  # queue_reset: a reset is done when the write to it is
        )

    def _queue_registers(self, select: int) -> tuple[int, ...]:
        """queue_size to queue_device of a queue; all 0 where there is none."""
        setup = self.driver.setup(select)
        if setup is None:
            return (0,) * 7
        vector = self.interrupts.queue_vectors[select]
        return setup.size, vector, setup.enabled, select, setup.desc, setup.avail, setup.used

    def _select_device_features(self, value: int) -> None:
        self.driver.device_feature_select = value

    def _select_driver_features(self, value: int) -> None:
        self.driver.driver_feature_select = value

    def _select_queue(self, value: int) -> None:
        self.driver.queue_select = value

    def _set_size(self, value: int) -> None:
        setup = self.driver.configurable
        largest = self.driver.dataplane.queues[self.driver.queue_select].max_size if setup else 0
        packed = self.driver.has_agreed(Feature.RING_PACKED)
        if setup and 0 < value <= largest and (packed or value & (value - 1) == 0):
            setup.size = value

    def _set_vector(self, value: int) -> None:
        if self.driver.setup(self.driver.queue_select):
            self.interrupts.set_queue_vector(self.driver.queue_select, value)

    def _enable(self, value: int) -> None:
        if value == 1:
            self.driver.enable_queue()

    def _reset_queue(self, value: int) -> None:
        if value == 1 and self.driver.has_agreed(Feature.RING_RESET):
            self.driver.reset_queue()
            self._set_vector(NO_VECTOR)

    def _set_address(self, ring: Ring, shift: int, width: int, value: int) -> None:
        setup = self.driver.configurable
        if setup:
            kept = getattr(setup, ring) & ~(((1 << width) - 1) << shift)
            setattr(setup, ring, kept | value << shift)
