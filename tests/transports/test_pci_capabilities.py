"""The PCI_CFG window: the registers of the BARs through configuration space (virtio 1.3, 4.1.4.9)."""

import pytest

from pyvirtio.devices.rng import Rng
from pyvirtio.spec import Status
from pyvirtio.testing import Guest
from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.registers import COMMON, COMMON_CFG, ISR_CFG, PCI_CFG, structures

BAR, OFFSET, LENGTH, DATA = 4, 8, 12, 16
LEGACY, MSIX, MODERN = 0, 1, 4


class ConfigWindow:
    """A driver that uses nothing but configuration space."""

    def __init__(self, driver: VirtioDriver) -> None:
        self.pci = driver.pci
        [found] = structures(driver.pci, PCI_CFG)
        self.at = found.capability

    def aim(self, bar: int, offset: int, length: int) -> None:
        self.pci.write(self.at + BAR, 1, bar)
        self.pci.write(self.at + OFFSET, 4, offset)
        self.pci.write(self.at + LENGTH, 4, length)

    def read(self, bar: int, offset: int, length: int) -> int:
        self.aim(bar, offset, length)
        return self.pci.read(self.at + DATA, length)

    def write(self, bar: int, offset: int, length: int, value: int) -> None:
        self.aim(bar, offset, length)
        self.pci.write(self.at + DATA, length, value)


def test_it_reads_what_the_bar_reads(guest: Guest) -> None:
    rng = guest.plug(Rng())
    window = ConfigWindow(rng)
    [common] = structures(rng.pci, COMMON_CFG)
    for name, (offset, size) in COMMON.items():
        for half in range(0, size, 4):
            width = min(size, 4)
            seen = window.read(common.bar, common.offset + offset + half, width)
            assert seen == rng.common.read(offset + half, width), name


def test_a_driver_can_be_brought_up_through_it(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes), start=False)
    window = ConfigWindow(rng)
    rng.negotiate()
    rng.set_up()
    offset = COMMON["device_status"][0]
    window.write(MODERN, offset, 1, rng.status | Status.DRIVER_OK)
    assert Status.DRIVER_OK in rng.status
    buffer = rng.requestq.add(writable=16)
    rng.requestq.kick()
    assert buffer.wait() == bytes(16)
    window.write(MODERN, offset, 1, 0)
    assert rng.status == 0


def test_a_notify_through_it_is_the_same_as_through_the_bar(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes))
    window = ConfigWindow(rng)
    (_, offset) = rng.notifiers[0]
    before = rng.function.dataplane.queues[0].counters["notifies"]
    for _ in range(5):
        buffer = rng.requestq.add(writable=16)
        rng.requestq.publish()
        window.write(MODERN, offset, 2, 0)
        assert buffer.wait() == bytes(16)
    assert rng.function.dataplane.queues[0].counters["notifies"] == before + 5


def test_the_isr_is_cleared_by_reading_it_there(guest: Guest) -> None:
    rng = guest.plug(Rng(), msix=False)
    rng.function.dataplane.state.notify_config()
    [isr] = structures(rng.pci, ISR_CFG)
    window = ConfigWindow(rng)
    window.aim(isr.bar, isr.offset, 1)
    line = guest.accel.lines[rng.pci.slot]
    assert line.level, "aiming is not reading"
    assert rng.pci.read(window.at + DATA, 1) == 3
    assert not line.level
    assert rng.pci.read(window.at + DATA, 1) == 0


def test_it_reaches_the_msix_table_and_the_legacy_registers(guest: Guest) -> None:
    rng = guest.plug(Rng(), start=False)
    window = ConfigWindow(rng)
    window.write(MSIX, 16, 4, 0xFEE00000)
    assert rng.pci.bars[MSIX].read(16, 4) == 0xFEE00000
    assert window.read(LEGACY, 0, 4) == rng.pci.bars[LEGACY].read(0, 4) != 0


def test_it_works_while_the_bars_are_not_decoded(guest: Guest) -> None:
    rng = guest.plug(Rng(), start=False)
    rng.pci.command = 0
    assert ConfigWindow(rng).read(MODERN, COMMON["num_queues"][0], 2) == 1


@pytest.mark.parametrize(
    ("bar", "offset", "length"),
    [
        (MODERN, 20, 0),
        (MODERN, 20, 3),
        (MODERN, 20, 8),
        (MODERN, 20, 0xFFFFFFFF),
        (MODERN, 21, 2),
        (MODERN, 22, 4),
        (MODERN, 0x4000, 1),
        (MODERN, 0x3FFC + 4, 4),
        (MODERN, 0xFFFFFFFC, 4),
        (3, 0, 4),
        (5, 0, 4),
        (6, 0, 4),
        (0xFF, 0, 4),
        (LEGACY, 0x20, 1),
    ],
)
def test_a_window_on_nothing_does_nothing(guest: Guest, bar: int, offset: int, length: int) -> None:
    rng = guest.plug(Rng(source=bytes))
    window = ConfigWindow(rng)
    before = rng.common.bytes(0, 64)
    window.aim(bar, offset, length)
    rng.pci.write(window.at + DATA, 4, 0)
    rng.pci.write(window.at + DATA, 4, 0x5AA5A55A)
    assert rng.pci.read(window.at + DATA, 4) == 0x5AA5A55A, "the data is plain memory then"
    assert rng.common.bytes(0, 64) == before
    buffer = rng.requestq.add(writable=16)
    rng.requestq.kick()
    assert buffer.wait() == bytes(16)


def test_what_the_driver_may_not_write_stays(guest: Guest) -> None:
    rng = guest.plug(Rng(), start=False)
    at = ConfigWindow(rng).at
    before = [rng.pci.read(at + n, 1) for n in (0, 1, 2, 3, 5, 6, 7)]
    for n in (0, 1, 2, 3, 5, 6, 7):
        rng.pci.write(at + n, 1, 0xFF)
    assert [rng.pci.read(at + n, 1) for n in (0, 1, 2, 3, 5, 6, 7)] == before
