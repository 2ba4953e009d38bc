"""A pause in the middle of everything: nothing is served during it, and no kick and no interrupt is lost."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from notified import Echo, Transitional, notifiers_of

from pyvirtio.backends.block import Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.blk import SECTOR, Disk

PAUSES = 100


@contextmanager
def pausing(driver: VirtioDriver) -> Iterator[list[int]]:
    """Pause and resume the device all the time, with ioeventfd on and off in turn; the list has an entry for each."""
    done, pauses, notifiers = threading.Event(), list[int](), notifiers_of(driver)

    def pause() -> None:
        while not done.is_set():
            notifiers.hold()
            if len(pauses) % 4 == 0:
                notifiers.ioeventfd = not notifiers.ioeventfd
            time.sleep(random.random() * 0.002)
            notifiers.unhold()
            pauses.append(1)
            time.sleep(random.random() * 0.001)

    thread = threading.Thread(target=pause)
    thread.start()
    try:
        yield pauses
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("msix", [True, False], ids=["msix", "intx"])
@pytest.mark.parametrize("event_idx", [True, False], ids=["event_idx", "flags"])
def test_every_request_is_answered_and_told(guest: Guest, msix: bool, event_idx: bool) -> None:
    """The driver sleeps on interrupts: one that is lost is a hang."""
    driver = guest.plug(Transitional(count=3), msix=msix, event_idx=event_idx)
    with pausing(driver) as pauses:
        number = 0
        while len(pauses) < PAUSES:
            number += 1
            buffers = [q.add(b"%d" % (number + n), 16) for q in driver.echoq for n in range(number % 4 + 1)]
            for q in driver.echoq:
                q.kick()
            assert all(buffer.wait() for buffer in buffers)


def test_a_native_plane_is_paused_like_a_handler(guest: Guest) -> None:
    driver = guest.plug(Blk(Memory(1 << 20)))
    disk = Disk(driver)
    with pausing(driver) as pauses:
        number = 0
        while len(pauses) < PAUSES:
            number += 1
            disk.write(number % 64, bytes([number % 256]) * SECTOR)
            assert disk.read(number % 64, SECTOR) == bytes([number % 256]) * SECTOR


def test_resets_and_pauses_do_not_wait_for_each_other(guest: Guest) -> None:
    driver = guest.plug(Echo(2))
    with pausing(driver) as pauses:
        while len(pauses) < PAUSES:
            for q in driver.echoq:
                q.add(b"x", 1)
                q.kick()
            driver.start()
    assert driver.echoq[0].add(b"after", 5).queue is driver.echoq[0]
    driver.echoq[0].kick()


def test_a_paused_device_may_be_unplugged(guest: Guest) -> None:
    driver = guest.plug(Echo())
    notifiers_of(driver).hold()
    guest.unplug(driver)


def test_a_device_that_starts_while_paused_serves_when_it_goes_on(guest: Guest) -> None:
    driver = guest.plug(Echo(), start=False)
    notifiers_of(driver).hold()
    driver.start()
    buffer = driver.echoq.add(b"x", 1)
    driver.echoq.kick()
    assert guest.accel.ioeventfds == set()
    assert driver.function.dataplane.queues[0].counters["chains"] == 0
    notifiers_of(driver).unhold()
    assert buffer.wait() == b"x"
