"""Pauses of a device on KVM while a vCPU kicks it: ioeventfds go away and come back, and every buffer is served."""

import threading
import time

import pytest
from freestanding import HANG, KvmGuest

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.spec import DeviceId, Status
from pyvirtio.testing import VirtioDriver


class Echo(Device, id=DeviceId.ENTROPY):
    """Gives back what it gets."""

    @queue(size=64, count=2)
    def echoq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.write(chain.read())
            chain.complete()


def plug(machine: KvmGuest, ioeventfd: bool) -> VirtioDriver:
    """Its driver polls: interrupts go into a guest that does not take them."""
    driver = machine.plug(Echo(), msix=False, start=False, ioeventfd=ioeventfd)
    driver.negotiate()
    driver.set_up()
    for each in driver.queues:
        each.polling = True
    driver.status |= Status.DRIVER_OK
    return driver


@pytest.mark.parametrize("ioeventfd", [False, True], ids=["sync", "ioeventfd"])
def test_no_kick_is_lost_in_a_pause(machine: KvmGuest, ioeventfd: bool) -> None:
    driver = plug(machine, ioeventfd)
    notifiers, done, pauses = driver.function.dataplane.notifiers, threading.Event(), list[int]()

    def pause() -> None:
        while not done.is_set():
            notifiers.hold()
            time.sleep(0.001)
            notifiers.unhold()
            pauses.append(1)
            time.sleep(0.001)

    thread = threading.Thread(target=pause)
    thread.start()
    try:
        while len(pauses) < 30:
            for number, each in enumerate(driver.queues):
                buffer = each.add(b"%d" % number, 8)
                each.kick()
                assert buffer.wait(HANG) == b"%d" % number
    finally:
        done.set()
        thread.join()
    assert notifiers.mode(0) == ("ioeventfd" if ioeventfd else "sync")


def test_a_kick_during_a_pause_exits_and_is_served_afterwards(machine: KvmGuest) -> None:
    driver = plug(machine, ioeventfd=True)
    notifiers = driver.function.dataplane.notifiers
    notifiers.hold()
    buffer = driver.queues[0].add(b"held", 8)
    before = machine.accel.cpu.exits
    driver.queues[0].kick()
    assert machine.accel.cpu.exits == before + 1
    assert driver.function.dataplane.queues[0].counters["chains"] == 0
    notifiers.unhold()
    assert buffer.wait(HANG) == b"held"
