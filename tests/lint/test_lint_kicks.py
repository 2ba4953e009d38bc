"""Kicks that were not asked for and kicks that are owed, however they travel; and what only looks like one of them."""

import time
from typing import Any

import pytest

from pyvirtio.devices.rng import Rng
from pyvirtio.testing import Guest, Queue, VirtioDriver
from pyvirtio.testing.packed import AT_DESC, DISABLE, ENABLE, PackedRing
from pyvirtio.testing.queue import HANG
from pyvirtio.testing.ring import NO_NOTIFY

lint = pytest.mark.guest(lint=True)
events = pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])


def rng(guest: Guest, **properties: Any) -> VirtioDriver:
    """A driver that has made three requests, each with its kick."""
    driver = guest.plug(Rng(source=bytes), **properties)
    for _ in range(3):
        wait_until_asked(driver.requestq)
        buffer = driver.requestq.add(writable=16)
        driver.requestq.kick()
        buffer.wait()
    return driver


def served(driver: VirtioDriver, kicks: int) -> None:
    """Wait until the device has found so many kicks of the driver, and is done."""
    vq, deadline = driver.function.dataplane.queues[0], time.monotonic() + HANG
    while vq.kicked < kicks:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    vq.hold()
    vq.release()
    vq.service()


def wait_until_asked(vq: Queue) -> None:
    """The device has gone to sleep: it asks to be told of the next buffer."""
    deadline = time.monotonic() + HANG
    while not asks(vq):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def asks(vq: Queue) -> bool:
    ring = vq.ring
    if isinstance(ring, PackedRing):
        return ring.device_flags == ENABLE or (ring.device_flags, ring.device_event) == (AT_DESC, int(ring.next_avail))
    return bool(ring.avail_event == ring.next_avail if ring.event_idx else not ring.used_flags)


def found(guest: Guest) -> list[tuple[str, str]]:
    assert guest.lint is not None
    return [(violation.who, violation.section) for violation in guest.lint.take()]


@lint
@pytest.mark.guest(transport=("modern", "legacy"))
def test_a_kick_for_nothing_is_noticed_though_it_is_an_eventfd(guest: Guest) -> None:
    driver = rng(guest)
    assert found(guest) == []
    driver.requestq.notify()
    served(driver, kicks=4)
    assert found(guest) == [("driver", "2.7.10.1")]
    buffer = driver.requestq.add(writable=16)
    driver.requestq.kick()
    buffer.wait()
    assert found(guest) == []  # it is told once


@lint
def test_a_driver_that_never_looks_whether_it_is_asked(guest: Guest) -> None:
    driver = guest.plug(Rng(source=bytes))
    vq = driver.requestq
    device = driver.function.dataplane.queues[0]
    device.hold()  # so that it asks for nothing meanwhile
    for _ in range(3):
        vq.add(writable=16)
        vq.publish()
        vq.notify()
    device.release()
    driver.function.dataplane.queues[0].service()
    served(driver, kicks=3)
    assert ("driver", "2.7.10.1") in found(guest)


@lint
def test_a_kick_may_come_late(guest: Guest) -> None:
    """One CPU is held up between its look at the ring and its kick; the other adds more, and kicks for that."""
    driver = guest.plug(Rng(source=bytes), ioeventfd=True)
    vq, device = driver.requestq, driver.function.dataplane.queues[0]
    wait_until_asked(vq)
    buffers = [vq.add(writable=16)]
    assert vq.publish()
    device.service()
    wait_until_asked(vq)
    buffers.append(vq.add(writable=16))
    vq.kick()
    for buffer in buffers:
        buffer.wait()
    vq.notify()
    served(driver, kicks=2)
    assert found(guest) == []


@lint
@pytest.mark.guest(packed=True)
def test_packed_rings_may_be_kicked_for_nothing(guest: Guest) -> None:
    driver = rng(guest)
    for _ in range(3):
        driver.requestq.notify()
    served(driver, kicks=6)
    assert found(guest) == []


@lint
@events
@pytest.mark.guest(transport=("modern", "legacy", "vhost-user"), packed=(False, True))
def test_a_kick_that_is_owed(guest: Guest, event_idx: bool) -> None:
    vq = rng(guest, event_idx=event_idx).requestq
    assert found(guest) == []
    # The device may have seen the last request before its kick, and be woken by that once more.
    violations = leave_unkicked(guest, vq) or leave_unkicked(guest, vq)
    assert violations == [("driver", "2.8.10" if guest.packed else "2.7.10.1")]


def leave_unkicked(guest: Guest, vq: Queue) -> list[tuple[str, str]]:
    """Make a buffer available and not tell the device; what is found then."""
    wait_until_asked(vq)
    vq.add(writable=16)
    assert vq.publish()
    return found(guest)


@lint
@events
@pytest.mark.guest(packed=(False, True))
def test_no_kick_is_owed_to_a_device_that_asked_for_none(guest: Guest, event_idx: bool) -> None:
    vq = rng(guest, event_idx=event_idx).requestq
    wait_until_asked(vq)
    ask_for_none(vq)
    vq.add(writable=16)
    assert not vq.publish()
    assert found(guest) == []


def ask_for_none(vq: Queue) -> None:
    if isinstance(vq.ring, PackedRing):
        vq.ring.device_flags = DISABLE
    elif vq.ring.event_idx:
        vq.ring.avail_event = vq.ring.next_avail + 100
    else:
        vq.ring.used_flags = NO_NOTIFY


@lint
@events
@pytest.mark.guest(packed=(False, True))
def test_no_kick_is_owed_to_a_device_that_has_looked(guest: Guest, event_idx: bool) -> None:
    driver = rng(guest, event_idx=event_idx)
    buffer = driver.requestq.add(writable=16)
    driver.requestq.publish()
    driver.function.dataplane.queues[0].service()
    buffer.wait()
    assert found(guest) == []
