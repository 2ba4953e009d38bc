"""MSI-X and INTx: the table, vectors, masks, and which interrupt arrives where."""

import errno
import os

import pytest

from pyvirtio import Device, VirtQueue, queue
from pyvirtio._core import MsixVector
from pyvirtio.devices.rng import Rng
from pyvirtio.spec import NO_VECTOR, DeviceId, Status
from pyvirtio.testing import Guest
from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.pci import Msix, Window
from pyvirtio.testing.queue import Msi

ENABLE, FUNCTION_MASK = Msix.ENABLE, Msix.FUNCTION_MASK
INTX_DISABLE = 1 << 10


class Pair(Device, id=DeviceId.CONSOLE):
    """A device with two queues that give back what they get."""

    @queue(size=16)
    def firstq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.complete()

    @queue(size=16)
    def secondq(self, vq: VirtQueue) -> None:
        self.firstq(vq)


class Table:
    """The MSI-X table of a driver's device, with any width and offset in reach."""

    def __init__(self, driver: VirtioDriver) -> None:
        assert driver.msix is not None
        self.msix = driver.msix
        self.window: Window = driver.pci.bars[1]

    def read(self, offset: int, size: int = 4) -> int:
        return self.window.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.window.write(offset, size, value)


def send(driver: VirtioDriver, index: int = 0) -> None:
    """Have the device use a buffer, without waiting for its interrupt."""
    vq = driver.queues[index]
    used = vq.ring.used_idx
    vq.polling = True
    vq.add(b"x")
    vq.publish()
    vq.notify()
    vq.wait_until(lambda: vq.ring.used_idx != used, "the buffer is used")
    vq.polling = False
    vq.collect()


def arrived(guest: Guest, message: tuple[int, int]) -> int:
    """How many interrupts this message has brought since the last call."""
    msi = Msi(guest.accel, *message)
    msi.take()
    return msi.count


def vector_of(driver: VirtioDriver, entry: int) -> MsixVector:
    assert driver.function.msix is not None
    return driver.function.msix.vectors[entry]


def entry_message(driver: VirtioDriver, entry: int) -> tuple[int, int]:
    table = Table(driver)
    return table.read(16 * entry) | table.read(16 * entry + 4) << 32, table.read(16 * entry + 8)


def test_a_fresh_table_is_masked_and_off(guest: Guest) -> None:
    pair = guest.plug(Pair(), start=False)
    table = Table(pair)
    assert table.msix.control == 2
    assert [table.read(at) for at in range(0, 48, 4)] == [0, 0, 0, 1] * 3
    assert table.read(2048, 8) == 0


@pytest.mark.parametrize(("offset", "size", "value"), [(0, 4, 0xFEE00000), (8, 8, 0x1_00004141), (0, 8, 0xFEE01000)])
def test_writes_of_4_and_8_bytes_read_back(guest: Guest, offset: int, size: int, value: int) -> None:
    table = Table(guest.plug(Pair(), start=False))
    table.write(16 + offset, size, value)
    assert table.read(16 + offset, size) == value


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (8, 1), (12, 1), (12, 2), (2, 4), (4, 8), (44, 8)])
def test_other_writes_are_ignored(guest: Guest, offset: int, size: int) -> None:
    table = Table(guest.plug(Pair(), start=False))
    before = [table.read(at) for at in range(0, 48, 4)]
    table.write(offset, size, 0)
    table.write(offset, size, (1 << 8 * size) - 1)
    assert [table.read(at) for at in range(0, 48, 4)] == before


def test_only_the_mask_bit_of_vector_control_can_be_written(guest: Guest) -> None:
    table = Table(guest.plug(Pair(), start=False))
    table.write(12, 4, 0xFFFFFFFE)
    assert table.read(12) == 0
    table.write(24, 8, 0xFFFFFFFF_12345678)
    assert table.read(24, 8) == 0x1_12345678


@pytest.mark.parametrize("size", [1, 4, 8])
def test_the_pending_bits_cannot_be_written(guest: Guest, size: int) -> None:
    table = Table(guest.plug(Pair(), start=False))
    table.write(2048, size, 7)
    assert table.read(2048, 8) == 0


def test_behind_the_table_there_is_nothing(guest: Guest) -> None:
    table = Table(guest.plug(Pair(), start=False))
    for offset in (48, 1024, 2040, 4088):
        table.write(offset, 8, 0xFFFF)
        assert table.read(offset, 8) == 0


@pytest.mark.parametrize("vector", [3, 4, 0x7FF, 0x8000, 0xFFFE])
def test_a_vector_that_does_not_exist_reads_back_no_vector(guest: Guest, vector: int) -> None:
    pair = guest.plug(Pair())
    pair.common.config_msix_vector = vector
    assert pair.common.config_msix_vector == NO_VECTOR
    assert pair.registers.set_queue_vector(0, vector) == NO_VECTOR
    assert pair.registers.set_queue_vector(1, 2) == 2


def test_without_vectors_every_vector_reads_back_no_vector(guest: Guest) -> None:
    pair = guest.plug(Pair(), vectors=0)
    assert pair.registers.set_queue_vector(0, 0) == NO_VECTOR
    buffer = pair.firstq.add(b"x")
    pair.firstq.kick()
    buffer.wait()


def test_no_vector_means_no_interrupt(guest: Guest) -> None:
    pair = guest.plug(Pair())
    message = entry_message(pair, 1)
    pair.registers.set_queue_vector(0, NO_VECTOR)
    arrived(guest, message)
    send(pair)
    assert arrived(guest, message) == 0
    assert not guest.accel.lines[pair.pci.slot].level


def test_a_vector_changed_in_flight_takes_the_next_interrupt(guest: Guest) -> None:
    pair = guest.plug(Pair())
    first, second = entry_message(pair, 1), entry_message(pair, 2)
    send(pair)
    assert arrived(guest, first) > 0
    pair.registers.set_queue_vector(0, 2)
    send(pair)
    assert (arrived(guest, first), arrived(guest, second)) == (0, 1)


def test_one_vector_for_many_queues(guest: Guest) -> None:
    pair = guest.plug(Pair(), vectors=2)
    for vq in (pair.firstq, pair.secondq, pair.firstq):
        buffer = vq.add(b"x")
        vq.kick()
        buffer.wait()
    assert pair.firstq.interrupts == 3


def test_all_events_on_one_vector(guest: Guest) -> None:
    pair = guest.plug(Pair(), vectors=1)
    for vq in (pair.firstq, pair.secondq):
        buffer = vq.add(b"x")
        vq.kick()
        buffer.wait()
    pair.function.dataplane.state.notify_config()
    assert pair.config_interrupts == 3


@pytest.mark.parametrize("how", ["entry", "function"])
def test_a_masked_vector_is_pending_and_delivered_on_unmask(guest: Guest, how: str) -> None:
    pair = guest.plug(Pair())
    table, message = Table(pair), entry_message(pair, 1)
    arrived(guest, message)

    def mask(masked: bool) -> None:
        if how == "entry":
            table.msix.mask(1, masked)
        else:
            table.msix.control = ENABLE | (FUNCTION_MASK if masked else 0)

    mask(True)
    assert not table.msix.pending(1)
    send(pair)
    assert table.msix.pending(1)
    assert arrived(guest, message) == 0
    mask(False)
    assert arrived(guest, message) == 1
    assert not table.msix.pending(1)


def test_the_function_mask_keeps_the_masks_of_the_entries(guest: Guest) -> None:
    pair = guest.plug(Pair())
    table, message = Table(pair), entry_message(pair, 1)
    arrived(guest, message)
    table.msix.control = ENABLE | FUNCTION_MASK
    table.msix.mask(1, True)
    send(pair)
    table.msix.control = ENABLE
    assert arrived(guest, message) == 0
    table.msix.mask(1, False)
    assert arrived(guest, message) == 1


@pytest.mark.parametrize("masked", [False, True])
def test_a_rewritten_entry_changes_the_route(guest: Guest, masked: bool) -> None:
    pair = guest.plug(Pair())
    table, old, new = Table(pair), entry_message(pair, 1), guest.message()
    arrived(guest, old)
    if masked:
        table.msix.mask(1, True)
    table.msix.set_message(1, *new)
    if masked:
        assert arrived(guest, new) == 0
        table.msix.mask(1, False)
    send(pair)
    assert arrived(guest, new) == 1
    assert guest.accel.routes[vector_of(pair, 1)] == new


def test_interrupts_go_to_intx_while_msix_is_off(guest: Guest) -> None:
    pair = guest.plug(Pair(), msix=False)
    line = guest.accel.lines[pair.pci.slot]
    send(pair)
    assert line.level
    assert pair.pci.read(6, 2) & 1 << 3, "interrupt status"
    assert pair.registers.read_isr() == 1
    assert not line.level
    assert not pair.pci.read(6, 2) & 1 << 3


def test_a_device_reset_lowers_the_line(guest: Guest) -> None:
    pair = guest.plug(Pair(), msix=False)
    send(pair)
    pair.common.device_status = 0
    assert not guest.accel.lines[pair.pci.slot].level
    assert pair.registers.read_isr() == 0


def test_enabling_msix_lowers_the_line_and_disabling_it_raises_it_again(guest: Guest) -> None:
    pair = guest.plug(Pair(), msix=False)
    line = guest.accel.lines[pair.pci.slot]
    send(pair)
    assert pair.msix is not None
    pair.msix.control = ENABLE
    assert not line.level
    assert not pair.pci.read(6, 2) & 1 << 3
    pair.msix.control = 0
    assert line.level


def test_the_intx_disable_bit_holds_the_line_back(guest: Guest) -> None:
    pair = guest.plug(Pair(), msix=False)
    line = guest.accel.lines[pair.pci.slot]
    pair.pci.command |= INTX_DISABLE
    send(pair)
    assert not line.level
    pair.pci.command &= ~INTX_DISABLE
    assert line.level


def test_vectors_are_routed_before_ioeventfds_and_released_when_msix_is_switched_off(guest: Guest) -> None:
    pair = guest.plug(Pair())
    assert set(guest.accel.routes) == {vector_of(pair, entry) for entry in range(3)}
    assert pair.msix is not None
    pair.msix.control = 0
    assert guest.accel.routes == {}
    pair.msix.control = ENABLE
    assert len(guest.accel.routes) == 3


def test_a_device_reset_drops_what_is_pending_and_keeps_the_table(guest: Guest) -> None:
    pair = guest.plug(Pair())
    table, message = Table(pair), entry_message(pair, 1)
    arrived(guest, message)
    table.msix.mask(1, True)
    send(pair)
    pair.reset()
    assert not table.msix.pending(1)
    assert entry_message(pair, 1) == message
    table.msix.mask(1, False)
    assert arrived(guest, message) == 0


def test_unplugging_releases_the_routes(guest: Guest) -> None:
    pair = guest.plug(Pair())
    assert guest.accel.routes
    guest.unplug(pair)
    assert guest.accel.routes == {}


def test_a_route_that_the_host_refuses_stays_masked(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(vector: MsixVector, address: int, data: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(guest.accel, "route_msi", refuse)
        pair = guest.plug(Pair(), name="pair0")
    assert "pair0: vector 1 stays masked" in caplog.text
    assert Status.NEEDS_RESET not in pair.status
    send(pair)
    table = Table(pair)
    assert table.msix.pending(1)
    table.msix.mask(1, False)
    assert arrived(guest, entry_message(pair, 1)) == 1


def test_a_transport_without_queues_in_use_has_no_interrupts(guest: Guest) -> None:
    rng = guest.plug(Rng(), start=False)
    rng.function.dataplane.state.notify_config()
    assert guest.accel.routes == {}
