"""VIRTIO_F_RING_RESET: one queue starts over while the others go on (virtio 1.3, 2.6.1 and 4.1.4.3)."""

import pytest
from attack import Keeper
from notified import Echo, echo, modes, queues_of

from pyvirtio import StaleChain
from pyvirtio.spec import NO_VECTOR, Feature, Status
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.pci import BUS_MASTER

RINGS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


def running(guest: Guest, *, packed: bool = False) -> VirtioDriver:
    driver = guest.plug(Echo(2), packed=packed)
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 2
    return driver


@RINGS
def test_the_queue_stops_and_the_other_goes_on(guest: Guest, packed: bool) -> None:
    driver = running(guest, packed=packed)
    mode = modes(driver)[1]
    driver.reset_queue(0)
    assert modes(driver) == ["-", mode]
    driver.queues[0].notify()
    assert echo(driver.echoq[1]) == b"hello"
    assert Status.DRIVER_OK in driver.status


@RINGS
def test_it_comes_back_with_another_size_and_other_addresses(guest: Guest, packed: bool) -> None:
    driver = running(guest, packed=packed)
    mode = modes(driver)
    for size in (4, 16, 8):
        driver.queue_size = size
        driver.reset_queue(0)
        renewed = driver.renew_queue(0)
        assert (renewed.ring.size, queues_of(driver)[0].size) == (size, size)
        assert modes(driver) == mode
        assert [echo(renewed) for _ in range(3 * size)] == [b"hello"] * 3 * size
    assert echo(driver.echoq[1]) == b"hello"


def test_the_registers_are_those_of_a_queue_that_was_never_set_up(guest: Guest) -> None:
    driver = running(guest)
    driver.reset_queue(1)
    common = driver.common
    assert (common.queue_size, common.queue_enable, common.queue_reset) == (16, 0, 0)
    assert (common.queue_desc, common.queue_driver, common.queue_device) == (0, 0, 0)
    assert common.queue_msix_vector == NO_VECTOR


def test_what_the_device_still_holds_is_stale(guest: Guest) -> None:
    device = Keeper()
    driver = guest.plug(device)
    driver.requestq.add(b"x", 8)
    driver.requestq.kick()
    chain = device.take()
    driver.reset_queue(0)
    with pytest.raises(StaleChain):
        chain.complete()
    buffer = driver.renew_queue(0).add(b"y", 8)
    driver.requestq.kick()
    device.take().complete()
    assert buffer.wait() == b""


def test_a_buffer_that_was_not_kicked_for_is_served_when_the_queue_is_enabled(guest: Guest) -> None:
    driver = running(guest)
    driver.reset_queue(0)
    common, old = driver.common, driver.queues[0]
    driver.registers.set_queue_vector(0, 1)
    ring = driver.make_ring(16)
    old.ring = ring
    buffer = old.add(b"early", 8)
    ring.publish()
    driver.registers.enable_queue(0, ring)
    assert buffer.wait() == b"early"
    assert common.queue_enable == 1


def test_without_the_feature_nothing_happens(guest: Guest) -> None:
    driver = guest.plug(Echo(), features=~int(Feature.RING_RESET))
    driver.common.queue_reset = 1
    assert driver.common.queue_enable == 1
    assert echo(driver.echoq) == b"hello"


@pytest.mark.parametrize("value", [0, 2, 3, 0xFFFF])
def test_only_1_resets(guest: Guest, value: int) -> None:
    driver = running(guest)
    driver.common.queue_reset = value
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 2


def test_a_queue_that_was_left_disabled_stays_closed(guest: Guest) -> None:
    """CVE-2026-5747: only a reset opens the registers of a queue while the driver is up."""
    driver = guest.plug(Echo(2), start=False)
    driver.negotiate()
    driver.queues.append(driver.set_up_queue(0, "echoq0", driver.config_source))
    driver.status |= Status.DRIVER_OK
    common = driver.common
    common.queue_select = 1
    common.queue_reset = 1
    common.queue_desc = 0x1000
    common.queue_enable = 1
    assert (common.queue_desc, common.queue_enable) == (0, 0)


def test_registers_close_again_once_the_queue_is_enabled(guest: Guest) -> None:
    driver = running(guest)
    driver.reset_queue(0)
    ring = driver.renew_queue(0).ring
    driver.common.queue_desc = 0xDEAD0
    assert driver.common.queue_desc == ring.desc


def test_a_ring_that_cannot_be_breaks_the_device(guest: Guest) -> None:
    driver = running(guest)
    driver.reset_queue(0)
    driver.common.queue_desc = 8
    driver.common.queue_enable = 1
    assert "not a multiple of 16" in driver.wait_needs_reset()
    driver.start()
    assert echo(driver.echoq[0]) == b"hello"


def test_a_queue_beyond_the_last_is_ignored(guest: Guest) -> None:
    driver = running(guest)
    driver.common.queue_select = 2
    driver.common.queue_reset = 1
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 2


def test_a_reset_while_bus_mastering_is_off(guest: Guest) -> None:
    driver = running(guest)
    command = driver.pci.command
    driver.pci.command = command & ~BUS_MASTER
    driver.reset_queue(0)
    renewed = driver.renew_queue(0)
    driver.pci.command = command
    assert [echo(renewed), echo(driver.echoq[1])] == [b"hello"] * 2
