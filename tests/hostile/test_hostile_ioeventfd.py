"""Hostile use of the eventfds. A failing assign, a pending kick at detach and vhost are in tests/notifiers."""

import gc
import os
import threading
from contextlib import suppress

import pytest
from attack import Echo, Keeper, echo

from pyvirtio import StaleChain
from pyvirtio.spec import Status
from pyvirtio.testing import Guest
from pyvirtio.testing.ring import WRITE, Desc
from pyvirtio.transports.base import IoAddress

SATURATED = (1 << 64) - 2


def test_a_saturated_counter_loses_no_kick_and_blocks_nobody(guest: Guest) -> None:
    driver = guest.plug(Echo())
    vq = driver.function.dataplane.queues[0]
    for n in range(20):
        with suppress(BlockingIOError):  # signalled already, so the room for this much is gone
            os.eventfd_write(vq.kick_fd, SATURATED)
        assert echo(driver.echoq, b"%d" % n) == b"%d" % n


def test_reset_with_the_eventfd_readable_leaves_the_new_ring_alone(guest: Guest) -> None:
    driver = guest.plug(Echo())
    vq = driver.function.dataplane.queues[0]
    for _ in range(20):
        driver.echoq.add(b"old", 3)
        driver.echoq.publish()
        os.eventfd_write(vq.kick_fd, 1)
        driver.negotiate()
        driver.set_up()
        q = driver.echoq
        q.add(b"new", 3)
        with guest.only_writes((q.ring.avail, 4)):
            q.publish()
            os.eventfd_write(vq.kick_fd, 1)
        assert q.ring.used_idx == 0, "nothing is consumed before DRIVER_OK"
        driver.status |= Status.DRIVER_OK
        [buffer] = q.pending.values()
        assert buffer.wait() == b"new"


def test_a_kick_to_every_queue_number_of_a_legacy_device(guest: Guest) -> None:
    class Legacy(Echo, id=4):
        """An echo with a legacy interface."""

    driver = guest.plug(Legacy(), transport="legacy")
    exits = guest.accel.exits
    for number in range(0, 65536, 257):
        driver.pci.bars[0].write(16, 2, number)
    assert guest.accel.exits - exits >= 255
    assert echo(driver.echoq) == b"hello"


def test_two_devices_on_one_address_are_refused(guest: Guest) -> None:
    guest.plug(Echo(), ioeventfd=True)
    [taken] = guest.accel.ioeventfds
    fd = os.eventfd(0)
    try:
        for at in (taken, IoAddress(taken.space, taken.address, 2, 0), IoAddress(taken.space, taken.address, 4, None)):
            with pytest.raises(FileExistsError):
                guest.accel.assign_ioeventfd(fd, at)
    finally:
        os.close(fd)
    assert guest.accel.ioeventfds == {taken}


def test_kicks_from_many_threads_during_resets(guest: Guest) -> None:
    """Whatever the others write to the notify register, a reset and a new start work."""
    driver = guest.plug(Echo())
    window, offset = driver.notifiers[0]
    stop = threading.Event()

    def kick() -> None:
        while not stop.is_set():
            window.write(offset, 2, 0)

    vcpus = [threading.Thread(target=kick) for _ in range(2)]
    for vcpu in vcpus:
        vcpu.start()
    try:
        for n in range(20):
            driver.start()
            assert echo(driver.echoq, b"%d" % n) == b"%d" % n
    finally:
        stop.set()
        for vcpu in vcpus:
            vcpu.join()


def test_reset_with_requests_in_flight(guest: Guest, event_idx: bool) -> None:
    """CVE-2026-45782: what completes after the reset reaches neither the old ring nor the new one."""
    device = Keeper()
    driver = guest.plug(device, event_idx=event_idx)
    for _ in range(20):
        buffers = [driver.requestq.add(b"x", 64) for _ in range(4)]
        driver.requestq.kick()
        chains = [device.take() for _ in buffers]
        driver.start()
        flags = (driver.requestq.ring.used, 2)  # the device may just be looking at the new ring for the first time
        with guest.only_writes(flags):
            for chain in chains:
                for touch in (lambda chain=chain: chain.write(b"late"), chain.complete):
                    with pytest.raises(StaleChain):
                        touch()
        assert driver.requestq.ring.used_idx == 0


def test_1000_resets_leave_nothing_behind(guest: Guest) -> None:
    """CVE-2019-14818, CVE-2020-10726: each set-up takes descriptors and memory, and gives all of it back."""
    driver = guest.plug(Echo())
    gc.collect()  # what the test before has left
    held = len(os.listdir("/proc/self/fd"))
    for _ in range(1000):
        driver.status = Status(0)
        driver.status = Status.ACKNOWLEDGE | Status.DRIVER
    assert len(os.listdir("/proc/self/fd")) == held
    for _ in range(50):
        driver.start()
        assert echo(driver.echoq) == b"hello"
    assert len(os.listdir("/proc/self/fd")) == held


def test_a_descriptor_that_changes_while_it_is_read(guest: Guest, event_idx: bool) -> None:
    """CVE-2020-14375: another vCPU rewrites the descriptor between good and bad all the time."""
    driver = guest.plug(Echo(), event_idx=event_idx)
    bystander = guest.plug(Echo())
    driver.may_break = True
    good, bad = guest.heap.allocate(64), 1 << 40
    stop = threading.Event()

    def race(ring_desc: int) -> None:
        while not stop.is_set():
            guest.memory.write(ring_desc, Desc(bad, 0xFFFFFFFF, WRITE).pack())
            guest.memory.write(ring_desc, Desc(good, 64, WRITE).pack())

    racer = threading.Thread(target=race, args=(driver.echoq.ring.desc,))
    racer.start()
    try:
        for _ in range(100):
            if driver.function.dataplane.state.broken:
                break
            driver.echoq.ring.offer(0)
            driver.echoq.ring.publish()
            driver.echoq.notify()
    finally:
        stop.set()
        racer.join()
    assert echo(bystander.echoq) == b"hello"
    driver.start()
    assert echo(driver.echoq) == b"hello"
