"""The legacy interface: registers in I/O space, rings by page number, and drivers that kick early."""

from typing import Any

import pytest

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.devices.rng import Rng
from pyvirtio.spec import NO_VECTOR, DeviceId, Feature, Status
from pyvirtio.testing import Guest
from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.pci import BUS_MASTER, IO, MEMORY, Msix
from pyvirtio.testing.ring import WRITE, Desc

ACKNOWLEDGED = Status.ACKNOWLEDGE | Status.DRIVER
UP = ACKNOWLEDGED | Status.DRIVER_OK
NOTIFY, STATUS, ISR = 16, 18, 19


class Pair(Device, id=DeviceId.CONSOLE):
    """A device with two queues that give back what they get; remembers when it was activated."""

    activated: int | None = None

    @queue(size=16)
    def firstq(self, vq: VirtQueue) -> None:
        assert self.activated is not None
        for chain in vq:
            chain.complete()

    @queue(size=32)
    def secondq(self, vq: VirtQueue) -> None:
        self.firstq(vq)

    def activate(self, features: int) -> None:
        self.activated = features


def plug(guest: Guest, device: Device | None = None, *, start: bool = True, **properties: Any) -> VirtioDriver:
    return guest.plug(device or Rng(source=bytes), transport="legacy", start=start, **properties)


def serves(driver: VirtioDriver, name: str = "requestq") -> bool:
    vq = getattr(driver, name)
    buffer = vq.add(writable=16)
    vq.kick()
    buffer.wait()
    return True


def test_what_is_offered(guest: Guest) -> None:
    rng = plug(guest, start=False)
    legacy = Feature.NOTIFY_ON_EMPTY | Feature.ANY_LAYOUT
    assert rng.registers.offered() == legacy | Feature.INDIRECT_DESC | Feature.EVENT_IDX


def test_bits_that_were_not_offered_are_dropped(guest: Guest) -> None:
    pair = plug(guest, Pair(), start=False)
    pair.negotiate()
    pair.common.driver_features = 0xFFFFFFFF
    assert pair.common.driver_features == pair.registers.offered()
    pair.set_up()
    pair.status |= Status.DRIVER_OK
    device = pair.function.device
    assert isinstance(device, Pair)
    assert device.activated == pair.registers.offered()


def test_bits_written_through_the_modern_registers_are_dropped_too(guest: Guest) -> None:
    pair = guest.plug(Pair(), start=False)
    pair.registers.accept((1 << 64) - 1)
    pair.pci.bars[0].write(STATUS, 1, UP)
    device = pair.function.device
    assert isinstance(device, Pair)
    assert device.activated == pair.pci.bars[0].read(0, 4)


def test_a_driver_that_writes_no_features_gets_a_plain_ring(guest: Guest) -> None:
    rng = plug(guest, features=0)
    assert rng.common.driver_features == 0
    assert serves(rng)
    assert rng.requestq.ring.avail_event == 0


def test_the_ring_lies_in_one_piece_from_its_page_on(guest: Guest) -> None:
    pair = plug(guest, Pair(), start=False)
    pair.negotiate()
    for index, size in enumerate((16, 32)):
        pair.common.queue_select = index
        assert pair.common.queue_size == size
        pair.common.queue_size = 4
        assert pair.common.queue_size == size, "a legacy driver takes the device's size"
        pair.common.queue_address = 0x20 + index
        assert pair.common.queue_address == 0x20 + index
        setup = pair.function.driver.setups[index]
        desc = 0x20000 + 4096 * index
        assert (setup.desc, setup.avail, setup.used) == (desc, desc + 16 * size, desc + 4096)


def test_a_queue_that_does_not_exist(guest: Guest) -> None:
    pair = plug(guest, Pair(), start=False)
    pair.negotiate()
    for select in (2, 0xFFFF):
        pair.common.queue_select = select
        pair.common.queue_address = 0x20
        assert pair.common.queue_size == pair.common.queue_address == 0
    assert not pair.why_broken


def test_a_kick_before_driver_ok_is_served(guest: Guest) -> None:
    pair = plug(guest, Pair(), start=False, msix=False)
    pair.negotiate()
    pair.set_up()
    assert guest.accel.ioeventfds == set(), "notifiers come up with DRIVER_OK"
    assert serves(pair, "secondq")
    pair.status |= Status.DRIVER_OK
    assert serves(pair, "secondq")
    assert serves(pair, "firstq")


def test_an_early_kick_without_bus_mastering_is_not_served(guest: Guest) -> None:
    rng = plug(guest, start=False)
    rng.negotiate()
    rng.set_up()
    rng.pci.command = IO | MEMORY
    buffer = rng.requestq.add(writable=16)
    rng.requestq.publish()
    with guest.only_writes():
        rng.requestq.notify()
    rng.pci.command = IO | MEMORY | BUS_MASTER
    rng.status |= Status.DRIVER_OK
    assert buffer.wait() == bytes(16)


def test_features_are_frozen_with_the_first_ring(guest: Guest) -> None:
    rng = plug(guest, start=False)
    rng.negotiate()
    before = rng.common.driver_features
    rng.set_up()
    rng.common.driver_features = 0
    assert rng.common.driver_features == before


@pytest.mark.parametrize("page", [0xFFFFFFFF, 0x3FF, 0x200000])
def test_a_ring_outside_ram_breaks_the_device(guest: Guest, page: int) -> None:
    rng = plug(guest, start=False)
    rng.negotiate()
    rng.common.queue_address = page
    assert Status.NEEDS_RESET in rng.status
    rng.may_break = True
    rng.start()
    assert serves(rng)


def test_page_0_gives_one_queue_up_and_its_notifier_down(guest: Guest) -> None:
    pair = plug(guest, Pair())
    notifiers = guest.accel.ioeventfds
    assert len(notifiers) == (4 if guest.ioeventfd else 0)
    pair.common.queue_select = 0
    pair.common.queue_address = 0
    assert pair.common.queue_address == 0
    gone = set(pair.function.notify_addresses(0))
    assert guest.accel.ioeventfds == notifiers - gone
    used = pair.firstq.ring.used_idx
    pair.firstq.add(b"x")
    pair.firstq.publish()
    pair.firstq.notify()
    assert serves(pair, "secondq")
    assert pair.firstq.ring.used_idx == used


def test_a_ring_is_not_replaced_while_it_is_in_use(guest: Guest) -> None:
    rng = plug(guest)
    page = rng.common.queue_address
    rng.common.queue_address = page + 100
    assert rng.common.queue_address == page
    assert serves(rng)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_notify_of_any_width(guest: Guest, size: int) -> None:
    rng = plug(guest)
    buffer = rng.requestq.add(writable=16)
    rng.requestq.publish()
    rng.requestq.notify(size)
    assert buffer.wait() == bytes(16)


def test_the_vector_registers_are_there_while_msix_is_enabled(guest: Guest) -> None:
    rng = plug(guest, start=False)
    assert rng.msix is not None
    window = rng.pci.bars[0]
    for vector in (20, 22):
        window.write(vector, 2, 1)
        assert window.read(vector, 2) == 0
    rng.msix.control = Msix.ENABLE
    for vector in (20, 22):
        assert window.read(vector, 2) == NO_VECTOR
        window.write(vector, 2, 1)
        assert window.read(vector, 2) == 1
        window.write(vector, 2, 2)
        assert window.read(vector, 2) == NO_VECTOR


def test_the_header_can_be_read_in_any_width(guest: Guest) -> None:
    rng = plug(guest, start=False)
    rng.negotiate()
    window = rng.pci.bars[0]
    header = bytes(window.read(n, 1) for n in range(20))
    for size in (2, 4):
        for offset in range(0, 16, size):
            assert window.read(offset, size) == int.from_bytes(header[offset : offset + size], "little")


def test_reading_the_isr_clears_it_and_its_neighbours_do_not(guest: Guest) -> None:
    rng = plug(guest, msix=False)
    rng.requestq.add(writable=16)
    rng.requestq.publish()
    rng.requestq.notify()
    line = guest.accel.lines[rng.pci.slot]
    rng.requestq.wait_until(lambda: line.level or rng.requestq.source.count > 0, "the line rises")
    rng.function.dataplane.state.notify_config()
    window = rng.pci.bars[0]
    window.read(NOTIFY, 2)
    window.read(STATUS, 1)
    window.read(NOTIFY, 4)
    window.read(STATUS, 2)
    assert line.level
    assert window.read(ISR, 1) == 3
    assert not line.level
    assert window.read(ISR, 1) == 0


def test_notify_on_empty(guest: Guest) -> None:
    """Asked first (2.7.7.2): the interrupt comes although the driver wants none."""
    rng = plug(guest, features=Feature.NOTIFY_ON_EMPTY)
    rng.requestq.ring.avail_flags = 1
    buffer = rng.requestq.add(writable=16)
    rng.requestq.kick()
    assert buffer.wait() == bytes(16)


def test_a_modern_driver_is_not_offered_what_is_legacy(guest: Guest) -> None:
    rng = guest.plug(Rng(), start=False)
    assert not rng.registers.offered() & (Feature.NOTIFY_ON_EMPTY | Feature.ANY_LAYOUT)


def test_all_status_values(guest: Guest) -> None:
    rng = plug(guest)
    for value in range(256):
        rng.status = Status(value)
    rng.start()
    assert rng.status == UP
    assert serves(rng)


def test_reset_forgets_the_rings(guest: Guest) -> None:
    rng = plug(guest)
    ring = rng.requestq.ring
    rng.reset()
    assert rng.common.queue_address == rng.common.driver_features == 0
    ring.add([Desc(0x8000, 16, WRITE)])
    ring.publish()
    with guest.only_writes():
        rng.pci.bars[0].write(NOTIFY, 2, 0)
