"""Another driver on the bare machine: written against `RawBus` alone, from what the specification says."""

import struct

from pyvirtio.devices.rng import Rng
from pyvirtio.testing import Guest, RawBus

RING, BUFFER = 0x10_0000, 0x11_0000
MESSAGE = 0xFEE0_0000, 0x4321


class TinyDriver:
    """Finds the first virtio function and drives queue 0 of it over the modern registers; 8 entries, MSI-X."""

    def __init__(self, bus: RawBus) -> None:
        self.bus, (self.slot,) = bus, bus.slots
        assert bus.config_read(self.slot, 0, 4) & 0xFFFF == 0x1AF4
        bus.config_write(self.slot, 4, 2, 7)
        self.at: dict[int, int] = {}
        self._walk(bus.config_read(self.slot, 0x34, 1))

    def _bar(self, index: int) -> int:
        low, high = (self.bus.config_read(self.slot, 0x10 + 4 * (index + n), 4) for n in (0, 1))
        return low & ~15 | (high << 32 if low & 4 else 0)

    def _walk(self, cap: int) -> None:
        while cap:
            kind = self.bus.config_read(self.slot, cap, 1)
            if kind == 0x09 and (cfg := self.bus.config_read(self.slot, cap + 3, 1)) < 5:
                bar, offset = self.bus.config_read(self.slot, cap + 4, 1), self.bus.config_read(self.slot, cap + 8, 4)
                self.at[cfg] = self._bar(bar) + offset
            elif kind == 0x11:
                self.msix, table = cap, self.bus.config_read(self.slot, cap + 4, 4)
                self.table = self._bar(table & 7) + (table & ~7)
            cap = self.bus.config_read(self.slot, cap + 1, 1)

    def start(self) -> None:
        common = self.at[1]
        for n, value in enumerate((MESSAGE[0], 0, MESSAGE[1], 0)):
            self.bus.mmio_write(self.table + 16 + 4 * n, 4, value)
        self.bus.config_write(self.slot, self.msix + 2, 2, 0x8000)
        for offset, size, value in (
            (20, 1, 0), (20, 1, 1), (20, 1, 3), (8, 4, 1), (12, 4, 1), (20, 1, 11), (22, 2, 0), (24, 2, 8), (26, 2, 1),
            (32, 8, RING), (40, 8, RING + 0x100), (48, 8, RING + 0x200), (28, 2, 1), (20, 1, 15),
        ):  # fmt: skip
            self.bus.mmio_write(common + offset, size, value)
        assert self.bus.mmio_read(common + 20, 1) == 15

    def request(self, length: int) -> tuple[int, bytes]:
        """One device-writable buffer; the used length and what it holds then."""
        self.bus.memory_write(RING, struct.pack("<QIHH", BUFFER, length, 2, 0))
        self.bus.memory_write(RING + 0x100, struct.pack("<HHH", 0, 1, 0))
        self.bus.mmio_write(self.at[2], 2, 0)
        assert self.bus.messages(timeout=10) == [MESSAGE]
        _, idx, _, used = struct.unpack("<HHII", self.bus.memory_read(RING + 0x200, 12))
        assert idx == 1
        return used, self.bus.memory_read(BUFFER, length)


def test_a_foreign_driver_finds_and_drives_a_device(guest: Guest) -> None:
    guest.plug(Rng(source=lambda n: b"\xa5" * n), start=False)
    driver = TinyDriver(guest.raw)
    driver.start()
    assert driver.request(24) == (24, b"\xa5" * 24)
    assert guest.raw.messages() == []


def test_a_system_reset_forgets_the_driver(guest: Guest) -> None:
    guest.plug(Rng(), start=False)
    driver = TinyDriver(guest.raw)
    driver.start()
    guest.raw.system_reset()
    assert guest.raw.config_read(driver.slot, 4, 2) & 7 == 0
    assert guest.raw.mmio_read(driver.at[1] + 20, 1) == 0xFF
    assert not guest.raw.intx(driver.slot)


def test_an_unplugged_function_answers_nothing(guest: Guest) -> None:
    guest.plug(Rng(), start=False)
    (slot,) = guest.raw.slots
    guest.raw.unplug(slot)
    assert guest.raw.slots == []
    assert guest.raw.config_read(slot, 0, 4) == 0xFFFF_FFFF
