"""The thermometer, in the hands of a driver that knows only what its class says."""

from pathlib import Path
from struct import unpack

import pytest
from thermometer import Thermometer

from pyvirtio.testing import Guest

pytestmark = pytest.mark.guest(transport=("modern", "vhost-user"), lint=True)


class Room:
    """A place with a temperature, and a thermometer that looks often."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.becomes(21500)
        self.thermometer = Thermometer(str(file), period=0.002)

    def becomes(self, temperature: int) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(f"{temperature}\n")
        new.rename(self.file)


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path / "temp")


def test_a_driver_reads_the_temperature_and_hears_of_changes(guest: Guest, room: Room) -> None:
    driver = guest.plug(room.thermometer)
    driver.alarmq.polling = True
    assert driver.config.temperature == 21500
    room.becomes(22000)
    driver.alarmq.wait_until(lambda: driver.config_interrupts == 1, "the driver is told")
    assert driver.config.temperature == 22000


def test_the_alarm_goes_off_once_when_it_gets_too_warm(guest: Guest, room: Room) -> None:
    driver = guest.plug(room.thermometer)
    driver.config.alarm = 25000
    buffers = [driver.alarmq.add(writable=4) for _ in range(2)]
    driver.alarmq.kick()
    room.becomes(25000)
    assert unpack("<i", buffers[0].wait()) == (25000,)
    room.becomes(26000)
    driver.alarmq.polling = True
    driver.alarmq.wait_until(lambda: driver.config.temperature == 26000, "it gets warmer")
    assert not buffers[1].done
    driver.start()
    assert room.thermometer.waiting == []
