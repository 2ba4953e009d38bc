"""Devices that are wrong on purpose: the lint says which rule they break, and that it was not the driver."""

import pytest

from pyvirtio.devices.rng import Rng
from pyvirtio.faults import Duplicate, Fault, Late, Length, Reorder
from pyvirtio.testing import Guest

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
