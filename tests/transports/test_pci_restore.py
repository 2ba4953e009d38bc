"""The state of a virtio-pci device, taken at any moment and given to a fresh device: the driver notices nothing."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from notified import Transitional
from pci_echo import Echo as Configurable

from pyvirtio import Chain, Device, VirtQueue, queue
from pyvirtio.errors import ConfigError
from pyvirtio.spec import DeviceId, Status
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.pci import BUS_MASTER, Msix
from pyvirtio.testing.queue import HANG


class Keeper(Device, id=DeviceId.ENTROPY):
    """Keeps what it gets until it is told to answer."""

    def __init__(self) -> None:
        self.kept: list[Chain] = []

    @queue(size=16)
    def keepq(self, vq: VirtQueue) -> None:
        self.kept.extend(vq)

    def answer(self) -> None:
        while self.kept:
            chain = self.kept.pop()
            chain.write(chain.read())
            chain.complete()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def served(driver: VirtioDriver, count: int) -> bool:
    vq = driver.function.dataplane.queues[0]
    return vq.counters["chains"] == count and vq.in_flight == 0 and vq.counters["interrupts"] > 0


def echo(driver: VirtioDriver, rounds: int = 1) -> None:
    for number in range(rounds):
        buffers = [driver.echoq.add(b"%d-%d" % (number, each), 16) for each in range(5)]
        driver.echoq.kick()
        assert [buffer.wait() for buffer in buffers] == [b"%d-%d" % (number, each) for each in range(5)]


KINDS: dict[str, dict[str, Any]] = {
    "split": {},
    "legacy": {"transport": "legacy"},
    "packed": {"packed": True},
    "in-order": {"in_order": True},
    "packed in-order": {"packed": True, "in_order": True},
}


@pytest.fixture(params=KINDS)
def echoing(guest: Guest, request: pytest.FixtureRequest) -> VirtioDriver:
    """A device that has served 35 requests: its ring of 16 has wrapped, an odd number of times if it is packed."""
    driver = guest.plug(Transitional(), **KINDS[request.param])
    echo(driver, rounds=7)
    return driver


def test_the_rings_go_on_where_they_were(echoing: VirtioDriver) -> None:
    ioeventfd = echoing.function.ioeventfd
    echoing.restore(Transitional(), echoing.save())
    assert echoing.function.ioeventfd is ioeventfd
    echo(echoing, rounds=7)


def test_what_was_made_available_before_is_served_after(echoing: VirtioDriver) -> None:
    echoing.function.dataplane.notifiers.hold()
    buffers = [echoing.echoq.add(b"%d" % each, 16) for each in range(3)]
    echoing.echoq.kick()
    echoing.restore(Transitional(), echoing.save())
    assert [buffer.wait() for buffer in buffers] == [b"0", b"1", b"2"]
    assert echoing.function.dataplane.queues[0].counters["interrupts"] == 1


def test_what_was_served_with_its_interrupt_on_the_way_is_told_again(echoing: VirtioDriver) -> None:
    """The guest did not get to see the interrupt; with MSI-X the state does not show that there was one."""
    buffer = echoing.echoq.add(b"seen?", 16)
    echoing.echoq.kick()
    until(lambda: served(echoing, 36))
    echoing.restore(Transitional(), echoing.save())
    assert buffer.wait() == b"seen?"


def test_a_masked_vector_stays_pending(guest: Guest) -> None:
    driver = guest.plug(Transitional())
    assert driver.msix is not None
    driver.msix.mask(1, True)
    buffer = driver.echoq.add(b"later", 16)
    driver.echoq.kick()
    until(lambda: served(driver, 1))
    driver.restore(Transitional(), driver.save())
    assert driver.function.interrupts.save()["msix"]["pending"] == [1]
    assert driver.echoq.interrupts == 0
    driver.msix.mask(1, False)
    assert buffer.wait() == b"later"


def test_a_function_mask_is_restored_too(guest: Guest) -> None:
    driver = guest.plug(Transitional())
    assert driver.msix is not None
    driver.msix.control = Msix.ENABLE | Msix.FUNCTION_MASK
    buffer = driver.echoq.add(b"later", 16)
    driver.echoq.kick()
    driver.restore(Transitional(), driver.save())
    assert driver.echoq.interrupts == 0
    driver.msix.control = Msix.ENABLE
    assert buffer.wait() == b"later"


def test_the_line_rises_again_and_the_isr_says_why(guest: Guest) -> None:
    driver = guest.plug(Transitional(), msix=False)
    driver.echoq.add(b"x", 16)
    driver.echoq.kick()
    line = guest.accel.lines[driver.pci.slot]
    until(lambda: line.level)
    driver.restore(Transitional(), driver.save())
    assert line.level
    assert driver.registers.read_isr() == 1
    assert not line.level


def test_a_line_that_was_low_stays_low(guest: Guest) -> None:
    driver = guest.plug(Transitional(), msix=False)
    echo(driver)
    driver.restore(Transitional(), driver.save())
    assert not guest.accel.lines[driver.pci.slot].level
    echo(driver)


def test_the_notifiers_are_up_at_the_same_addresses(guest: Guest) -> None:
    driver = guest.plug(Transitional())
    before = guest.accel.ioeventfds
    driver.restore(Transitional(), driver.save())
    assert guest.accel.ioeventfds == before
    assert driver.function.dataplane.notifiers.mode(0) == ("ioeventfd" if guest.ioeventfd else "sync")


def test_configuration_and_its_generation(guest: Guest) -> None:
    driver = guest.plug(Configurable())
    driver.config.value = 77
    generation = driver.common.config_generation
    driver.restore(Configurable(), driver.save())
    assert (driver.config.value, driver.common.config_generation) == (77, generation)


def test_a_driver_half_way_through_its_set_up_goes_on(guest: Guest) -> None:
    driver = guest.plug(Transitional(), start=False)
    driver.negotiate()
    driver.set_up()
    driver.restore(Transitional(), driver.save())
    assert Status.DRIVER_OK not in driver.status
    driver.status |= Status.DRIVER_OK
    echo(driver)


def test_a_device_without_bus_mastering_starts_with_it(guest: Guest) -> None:
    driver = guest.plug(Transitional())
    echo(driver, rounds=2)
    command = driver.pci.command
    driver.pci.command = command & ~BUS_MASTER
    driver.restore(Transitional(), driver.save())
    driver.pci.command = command
    echo(driver, rounds=2)


def test_a_broken_device_is_broken_until_it_is_reset(guest: Guest) -> None:
    driver = guest.plug(Transitional())
    driver.may_break = True
    driver.function.dataplane.state.fail("a test said so")
    driver.restore(Transitional(), driver.save())
    assert Status.NEEDS_RESET in driver.status
    assert driver.why_broken == "a test said so"
    driver.start()
    echo(driver)


def test_a_legacy_ring_before_driver_ok(guest: Guest) -> None:
    """It is served as soon as it has an address."""
    driver = guest.plug(Transitional(), transport="legacy", start=False)
    driver.negotiate()
    driver.set_up()
    driver.echoq.polling = True
    echo(driver)
    driver.restore(Transitional(), driver.save())
    echo(driver)
    driver.status |= Status.DRIVER_OK
    echo(driver)


def test_chains_under_way_are_waited_for(guest: Guest) -> None:
    device = Keeper()
    driver = guest.plug(device)
    buffer = driver.keepq.add(b"kept", 16)
    driver.keepq.kick()
    until(lambda: bool(device.kept))
    driver.function.dataplane.notifiers.hold()
    left = "0.01 s passed with chains that Keeper.keepq took and did not complete: 1; each needs its"
    with pytest.raises(ConfigError, match=rf"^keeper0\.keepq: {left} complete\(\)$"):
        driver.function.dataplane.drain(0.01)
    device.answer()
    driver.restore(Keeper(), driver.save())
    assert buffer.wait() == b"kept"


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"vectors": 7}, "another device, or another property"),
        ({"event_idx": False}, "transitional0: offers the features"),
        ({"disable_modern": True}, "another device, or another property"),
    ],
)
def test_another_property_is_one_line(guest: Guest, properties: dict[str, int], message: str) -> None:
    driver = guest.plug(Transitional())
    state = driver.save()
    with pytest.raises(ConfigError, match=message) as refused:
        driver.restore(Transitional(), state, **properties)
    assert "\n" not in str(refused.value)


def test_nothing_is_served_while_held_and_nothing_is_lost(guest: Guest) -> None:
    driver = guest.plug(Transitional())
    notifiers = driver.function.dataplane.notifiers
    for _ in range(100):
        notifiers.hold()
        notifiers.hold()
        buffer = driver.echoq.add(b"held", 16)
        driver.echoq.kick()
        driver.function.dataplane.queues[0].service()
        assert not buffer.done
        assert notifiers.mode(0) == "paused"
        assert guest.accel.ioeventfds == set()
        notifiers.unhold()
        notifiers.unhold()
        assert buffer.wait(HANG) == b"held"
