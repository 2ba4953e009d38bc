"""The thermometer, in the hands of a driver that knows only what its class says."""

from pathlib import Path
from struct import unpack

import pytest
from thermometer import Thermometer

from pyvirtio.testing import Guest


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A place with a temperature."""
    path = tmp_path / "temp"
    path.write_text("21500\n")
    return path


@pytest.mark.guest(transport=("modern", "vhost-user"), lint=True)
def test_a_driver_reads_the_temperature_and_hears_of_changes(guest: Guest, room: Path) -> None:
    device = Thermometer(str(room))
    driver = guest.plug(device)
    assert driver.config.temperature == 21500
    before = driver.config_interrupts
    room.write_text("22000")
    device.measure()
    assert driver.config.temperature == 22000
    assert driver.config_interrupts > before


@pytest.mark.guest(transport=("modern", "vhost-user"), lint=True)
def test_the_alarm_goes_off_once_when_it_gets_too_warm(guest: Guest, room: Path) -> None:
    device = Thermometer(str(room))
    driver = guest.plug(device)
    driver.config.alarm = 25000
    buffers = [driver.alarmq.add(writable=4) for _ in range(2)]
    driver.alarmq.kick()
    driver.alarmq.wait_until(lambda: len(device.waiting) == 2, "the device has the buffers")
    for temperature in (24999, 25000, 26000):
        room.write_text(str(temperature))
        device.measure()
    assert unpack("<i", buffers[0].wait()) == (25000,)
    assert not buffers[1].done
    driver.start()
    assert device.waiting == []
