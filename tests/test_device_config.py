"""The configuration space of a device: what the driver reads, what it is told, and what it writes."""

from ctypes import LittleEndianStructure, c_uint16, c_uint32

import pytest

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.testing import Guest


class ThermometerConfig(LittleEndianStructure):
    """The temperature, twice."""

    _pack_ = 1
    _fields_ = (("millikelvin", c_uint32), ("again", c_uint32), ("unit", c_uint16))


class Thermometer(Device, id=63, config=ThermometerConfig):
    """Tells the temperature, and remembers what the driver writes."""

    def __init__(self) -> None:
        self.config.unit = 75
        self.written: list[tuple[int, bytes]] = []

    @queue(size=8)
    def idleq(self, vq: VirtQueue) -> None: ...

    def measured(self, millikelvin: int) -> None:
        with self.update_config() as config:
            config.millikelvin = millikelvin
            config.again = millikelvin

    def write_config(self, offset: int, data: bytes) -> None:
        self.written.append((offset, data))


def test_configuration_is_readable_at_every_width_and_zero_past_its_end(guest: Guest) -> None:
    device = Thermometer()
    device.config.millikelvin = 0x11223344
    config = guest.plug(device).config
    assert (config.millikelvin, config.unit) == (0x11223344, 75)
    assert [config.read(n, 1) for n in range(4)] == [0x44, 0x33, 0x22, 0x11]
    assert [config.read(n, 2) for n in (0, 2)] == [0x3344, 0x1122]
    assert config.read(64, 4) == 0


def test_update_config_tells_the_driver_once(guest: Guest) -> None:
    device = Thermometer()
    driver = guest.plug(device)
    generation = driver.common.config_generation
    device.measured(300_000)
    assert driver.config_interrupts == 1
    assert driver.common.config_generation != generation
    assert (driver.config.millikelvin, driver.config.again) == (300_000, 300_000)


def test_update_config_says_nothing_before_the_driver_is_up(guest: Guest) -> None:
    device = Thermometer()
    driver = guest.plug(device, start=False)
    device.measured(300_000)
    driver.start()
    assert driver.config_interrupts == 0
    assert driver.config.millikelvin == 300_000


def test_a_failed_update_of_the_config_changes_nothing(guest: Guest) -> None:
    device = Thermometer()
    driver = guest.plug(device)

    def measure() -> None:
        with device.update_config() as config:
            config.millikelvin = 1
            raise RuntimeError("sensor")

    with pytest.raises(RuntimeError, match="sensor"):
        measure()
    assert driver.config.millikelvin == 0
    assert driver.config_interrupts == 0


def test_writes_to_the_configuration_reach_the_device(guest: Guest) -> None:
    device = Thermometer()
    driver = guest.plug(device)
    driver.config.unit = 70
    assert device.written == [(8, b"\x46\0")]
