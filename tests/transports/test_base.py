"""The device status: what a driver may do, and what happens to one that does something else."""

from typing import Any

import pytest

from pyvirtio.devices.rng import Rng
from pyvirtio.spec import Feature, Status
from pyvirtio.testing import Guest
from pyvirtio.testing.driver import VirtioDriver

ACKNOWLEDGED = Status.ACKNOWLEDGE | Status.DRIVER
UP = ACKNOWLEDGED | Status.FEATURES_OK | Status.DRIVER_OK


def found(guest: Guest, **properties: Any) -> VirtioDriver:
    """A driver that has seen the device, and no more."""
    driver = guest.plug(Rng(source=bytes), start=False, **properties)
    driver.status = ACKNOWLEDGED
    return driver


def serves(rng: VirtioDriver) -> bool:
    """Whether a request is answered; tells a stopped device by its silence to a notify on this thread."""
    buffer = rng.requestq.add(writable=16)
    rng.requestq.kick()
    return bool(buffer.wait() == bytes(16))


def is_silent(rng: VirtioDriver) -> bool:
    """Whether nothing carries kicks and a notify is not served."""
    used = rng.requestq.ring.used_idx
    rng.requestq.add(writable=16)
    rng.requestq.publish()
    rng.requestq.notify()
    return rng.requestq.ring.used_idx == used and not rng.function.dataplane.notifiers.running


def test_a_driver_that_does_as_told(guest: Guest) -> None:
    rng = found(guest)
    rng.registers.accept(Feature.VERSION_1)
    for added in (Status.FEATURES_OK, Status.DRIVER_OK):
        rng.status |= added
        assert added in rng.status
    assert rng.status == UP


@pytest.mark.parametrize(
    "unoffered",
    [1 << 0, Feature.NOTIFY_ON_EMPTY, Feature.ANY_LAYOUT, Feature.ACCESS_PLATFORM, Feature.RING_PACKED, 1 << 63],
)
def test_features_ok_does_not_stick_with_a_bit_that_was_not_offered(guest: Guest, unoffered: int) -> None:
    rng = found(guest)
    rng.registers.accept(Feature.VERSION_1 | unoffered)
    rng.status |= Status.FEATURES_OK
    assert rng.status == ACKNOWLEDGED
    rng.registers.accept(Feature.VERSION_1)
    rng.status |= Status.FEATURES_OK
    assert Status.FEATURES_OK in rng.status


@pytest.mark.parametrize("disable_legacy", [True, False])
def test_no_version_1_is_refused_where_there_is_no_legacy_interface(guest: Guest, disable_legacy: bool) -> None:
    rng = found(guest, disable_legacy=disable_legacy)
    rng.registers.accept(0)
    rng.status |= Status.FEATURES_OK
    assert (Status.FEATURES_OK in rng.status) != disable_legacy


def test_features_are_frozen_after_features_ok(guest: Guest) -> None:
    rng = found(guest)
    rng.registers.accept(Feature.VERSION_1)
    rng.status |= Status.FEATURES_OK
    rng.registers.accept(Feature.VERSION_1 | Feature.EVENT_IDX)
    rng.common.driver_feature_select = 0
    assert rng.common.driver_feature == 0
    rng.status = ACKNOWLEDGED
    rng.registers.accept(Feature.VERSION_1 | Feature.EVENT_IDX)
    rng.status |= Status.FEATURES_OK
    rng.common.driver_feature_select = 0
    assert rng.common.driver_feature == 0, "only a reset starts a new negotiation"


def test_driver_ok_without_features_ok_starts_nothing(guest: Guest) -> None:
    rng = found(guest)
    rng.registers.accept(Feature.VERSION_1)
    rng.set_up()
    rng.status |= Status.DRIVER_OK
    assert is_silent(rng)
    assert guest.accel.ioeventfds == set()


def test_driver_ok_twice_assigns_nothing_twice(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes))
    assigns = guest.accel.assigns
    assert (assigns > 0) == bool(guest.ioeventfd)
    for _ in range(3):
        rng.status |= Status.DRIVER_OK
    assert guest.accel.assigns == assigns
    assert serves(rng)


def test_clearing_driver_ok_stops_and_setting_it_goes_on(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes), indirect=True)
    assert serves(rng)
    rng.status = UP & ~Status.DRIVER_OK
    assert guest.accel.ioeventfds == set()
    assert is_silent(rng)
    rng.status = UP
    assert serves(rng)
    assert rng.requestq.ring.used_idx == 3


@pytest.mark.parametrize("bit", [Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK])
def test_clearing_a_single_bit_harms_nobody(guest: Guest, bit: Status) -> None:
    rng, other = guest.plug(Rng(source=bytes)), guest.plug(Rng(source=bytes))
    rng.status = UP & ~bit
    assert rng.status == UP & ~bit
    assert serves(other)
    rng.start()
    assert serves(rng)


def test_all_values_from_every_state(guest: Guest) -> None:
    rng, other = guest.plug(Rng(source=bytes)), guest.plug(Rng(source=bytes))
    for value in range(256):
        rng.status = Status(value)
        assert rng.status & ~Status(value) == 0, "the device invents no bits"
        rng.requestq.notify()
        if value % 16 == 15:
            rng.start()
            assert serves(rng)
    assert serves(other)


def test_a_driver_cannot_set_needs_reset(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes))
    rng.status |= Status.NEEDS_RESET
    assert rng.status == UP
    assert serves(rng)


def test_needs_reset_stays_until_the_reset(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes))
    rng.function.dataplane.state.fail("a test")
    assert rng.wait_needs_reset() == "a test"
    rng.status = UP
    assert rng.status == UP | Status.NEEDS_RESET
    rng.start()
    assert rng.status == UP
    assert serves(rng)


def test_failed_then_reset(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes))
    rng.status |= Status.FAILED
    assert Status.FAILED in rng.status
    rng.reset()
    assert rng.status == 0
    rng.start()
    assert serves(rng)


def test_reset_between_features_ok_and_driver_ok(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes), start=False)
    for _ in range(3):
        rng.negotiate()
        rng.set_up()
        rng.reset()
        assert rng.common.queue_enable == rng.common.queue_desc == 0
        assert rng.common.queue_msix_vector == rng.common.config_msix_vector == 0xFFFF
    rng.start()
    assert serves(rng)


def test_1000_resets_back_to_back(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes))
    for _ in range(1000):
        rng.status = Status(0)
        assert rng.status == 0
    assert guest.accel.ioeventfds == set()
    rng.start()
    assert serves(rng)


def test_a_reset_keeps_the_ioeventfd_property(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes))
    rng.reset()
    assert rng.function.ioeventfd == guest.ioeventfd


def test_a_device_that_cannot_be_activated_breaks_alone(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    class Stubborn(Rng):
        """Fails when its driver comes up."""

        def activate(self, features: int) -> None:
            raise RuntimeError("no hardware")

    rng, other = guest.plug(Stubborn(source=bytes)), guest.plug(Rng(source=bytes))
    assert rng.wait_needs_reset().startswith("Stubborn.activate raised RuntimeError: no hardware (test_base.py:")
    assert "Traceback" in caplog.text
    assert serves(other)
