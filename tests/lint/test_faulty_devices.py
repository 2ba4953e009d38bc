"""Devices that are wrong on purpose: the lint says which rule they break, and that it was not the driver."""

import pytest

from pyvirtio.devices.rng import Rng
from pyvirtio.faults import Duplicate, Fault, Late, Length, LostInterrupt, Reorder, Spurious
from pyvirtio.testing import Guest, Queue
from pyvirtio.testing.packed import DISABLE, PackedRing
from pyvirtio.testing.ring import NO_INTERRUPT

pytestmark = pytest.mark.guest(transport=("modern", "vhost-user"), lint=True)


def found(guest: Guest, fault: Fault) -> set[tuple[str, str]]:
    """(who, section) of what the lint says while a device with this fault serves a few requests."""
    assert guest.lint is not None
    device = Rng(source=bytes)
    device.faults.add(fault, seed=1)
    driver = guest.plug(device)
    for _ in range(3):
        buffers = [driver.requestq.add(writable=16) for _ in range(4)]
        driver.requestq.kick()
        for buffer in buffers:
            buffer.wait()
    guest.unplug(driver)
    return {(violation.who, violation.section) for violation in guest.lint.take()}


def test_a_used_length_that_is_too_long(guest: Guest) -> None:
    assert found(guest, Length(17)) == {("device", "2.7.8.2")}


def test_a_buffer_that_comes_back_twice(guest: Guest) -> None:
    assert found(guest, Duplicate()) == {("device", "2.7.8")}


@pytest.mark.parametrize("fault", [Reorder(), Late("1ms")], ids=["reordered", "late"])
def test_what_a_device_may_do(guest: Guest, fault: Fault) -> None:
    assert found(guest, fault) == set()


unheard = pytest.mark.guest(transport=("modern", "legacy"), ioeventfd=False, packed=(False, True))
events = pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])


def interrupted(guest: Guest, *faults: Fault, event_idx: bool, wanted: bool = True) -> set[tuple[str, str]]:
    """What the lint says of a device whose driver looks for itself, and may have no use for interrupts."""
    assert guest.lint is not None
    device = Rng(source=bytes)
    device.faults.add(*faults, seed=1)
    vq = guest.plug(device, event_idx=event_idx).requestq
    vq.polling = True
    for number in range(3):
        if number and not wanted:
            want_none(vq)
        buffer = vq.add(writable=16)
        vq.kick()
        buffer.wait()
    return {(violation.who, violation.section) for violation in guest.lint.take()}


def want_none(vq: Queue) -> None:
    if isinstance(vq.ring, PackedRing):
        vq.ring.driver_flags = DISABLE
    elif vq.ring.event_idx:
        vq.ring.used_event = vq.ring.next_used + 100
    else:
        vq.ring.avail_flags = NO_INTERRUPT


@unheard
@events
@pytest.mark.parametrize("fault", [LostInterrupt(), Spurious()], ids=["lost", "spurious"])
def test_an_interrupt_that_does_not_come_or_comes_for_nothing(guest: Guest, fault: Fault, event_idx: bool) -> None:
    section = "2.8.10" if guest.packed else "2.7.7.2"
    assert interrupted(guest, fault, event_idx=event_idx) == {("device", section)}


@unheard
@events
@pytest.mark.parametrize("wanted", [False, True])
def test_interrupts_as_the_driver_wants_them(guest: Guest, event_idx: bool, wanted: bool) -> None:
    assert interrupted(guest, event_idx=event_idx, wanted=wanted) == set()
