"""Host notifiers: no kick is lost in any transition, and all are counted."""

import errno
import os
import sys
import threading
from collections.abc import Callable

import pytest
from notified import Echo, Gate, Transitional, echo, modes, notifiers_of, queues_of, wait_for_kicks

from pyvirtio.backends.block import Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.rng import Rng
from pyvirtio.spec import Status
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.queue import HANG
from pyvirtio.testing.registers import PCI_CFG, structures

RINGS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


def test_a5_on_by_default_for_blk_only(guest: Guest) -> None:
    guest.ioeventfd = None
    assert guest.plug(Blk(Memory(4096))).function.ioeventfd
    assert not guest.plug(Rng()).function.ioeventfd
    assert not guest.plug(Echo()).function.ioeventfd


def test_a5_switched_while_the_guest_runs(guest: Guest) -> None:
    driver = guest.plug(Echo(2))
    for wanted in (False, True, True, False, False, True):
        driver.function.ioeventfd = wanted
        assert modes(driver) == ["ioeventfd" if wanted else "sync"] * 2
        assert [echo(q) for q in driver.echoq] == [b"hello"] * 2


@RINGS
def test_a5_no_kick_is_lost_while_it_flips_under_load(guest: Guest, packed: bool) -> None:
    driver = guest.plug(Echo(2, size=64), packed=packed)
    done = threading.Event()

    def flip() -> None:
        while not done.is_set():
            driver.function.ioeventfd = not driver.function.ioeventfd

    flipper = threading.Thread(target=flip)
    flipper.start()
    try:
        for n in range(400):
            sent = [q.add(b"%d" % n, 8) for q in driver.echoq for _ in range(3)]
            for q in driver.echoq:
                q.kick()
            assert [buffer.wait() for buffer in sent] == [b"%d" % n] * 6
    finally:
        done.set()
        flipper.join()
    assert [vq.counters["chains"] for vq in queues_of(driver)] == [1200, 1200]


@RINGS
def test_a5_every_kick_is_counted_while_it_flips(guest: Guest, packed: bool) -> None:
    """Each notify either exits or signals the eventfd, and each signal is read once."""
    driver = guest.plug(Echo(), packed=packed)
    vq = queues_of(driver)[0]
    for n in range(200):
        if n % 10 == 0:
            driver.function.ioeventfd = not driver.function.ioeventfd
        driver.echoq.notify()
    driver.function.ioeventfd = False
    assert vq.counters["notifies"] == 100
    wait_for_kicks(vq, 100)


def test_a6_buffers_made_available_before_driver_ok_are_served(guest: Guest) -> None:
    driver = guest.plug(Echo(), start=False)
    driver.negotiate()
    driver.set_up()
    buffer = driver.echoq.add(b"early", 5)
    driver.echoq.publish()
    driver.status |= Status.DRIVER_OK
    assert buffer.wait() == b"early"


def test_a6_attach_leaves_the_eventfd_signalled(guest: Guest) -> None:
    driver = guest.plug(Echo(), ioeventfd=False)
    vq = queues_of(driver)[0]
    vq.attach()
    assert os.eventfd_read(vq.kick_fd) > 0
    vq.detach()


def test_a6_detach_serves_a_kick_that_nobody_has_read(guest: Guest) -> None:
    """The I/O thread is busy elsewhere, the kick is in the eventfd, and then ioeventfd is switched off."""
    gate, device = Gate(), Echo()
    busy, driver = guest.plug(gate, ioeventfd=True), guest.plug(device, ioeventfd=True)
    busy.gateq.add(writable=1)
    busy.gateq.kick()
    assert gate.entered.wait(HANG)
    try:
        buffer = driver.echoq.add(b"last", 4)
        driver.echoq.kick()
        assert not buffer.done
        driver.function.ioeventfd = False
        assert buffer.wait() == b"last"
        assert device.threads == {threading.get_ident()}
    finally:
        gate.open.set()


def test_a6_a_kick_between_any_two_transitions_is_served(guest: Guest) -> None:
    driver = guest.plug(Echo(size=256))
    notifiers = notifiers_of(driver)

    def move_nothing() -> None:
        with notifiers.moving():
            buffers.append(driver.echoq.add(b"x", 1))
            driver.echoq.kick()

    def flip() -> None:
        driver.function.ioeventfd = not driver.function.ioeventfd

    buffers = []
    for _ in range(30):
        for transition in (flip, move_nothing):
            buffers.append(driver.echoq.add(b"x", 1))
            driver.echoq.kick()
            transition()
    assert [buffer.wait() for buffer in buffers] == [b"x"] * len(buffers)


def through_the_window(driver: VirtioDriver) -> None:
    """Notify queue 0 through the PCI_CFG capability."""
    cap = structures(driver.pci, PCI_CFG)[0].capability
    window, offset = driver.notifiers[0]
    bar = next(index for index, bar in driver.pci.bars.items() if bar is window)
    driver.pci.write(cap + 4, 1, bar)
    driver.pci.write(cap + 8, 4, offset)
    driver.pci.write(cap + 12, 4, 2)
    driver.pci.write(cap + 16, 2, 0)


def test_a8_up_it_signals_the_eventfd_and_never_runs_the_handler_here(guest: Guest) -> None:
    device = Echo()
    driver = guest.plug(device, ioeventfd=True)
    for _ in range(50):
        buffer = driver.echoq.add(b"x", 1)
        driver.echoq.publish()
        through_the_window(driver)
        buffer.wait()
    assert threading.get_ident() not in device.threads
    assert queues_of(driver)[0].counters["notifies"] == 50


def test_a8_down_it_is_served_here(guest: Guest) -> None:
    device = Echo()
    driver = guest.plug(device, ioeventfd=False)
    for _ in range(5):
        buffer = driver.echoq.add(b"x", 1)
        driver.echoq.publish()
        through_the_window(driver)
        assert buffer.wait() == b"x"
    assert device.threads == {threading.get_ident()}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a8_any_width_has_the_same_effect(guest: Guest, size: int) -> None:
    for driver in (guest.plug(Transitional()), guest.plug(Transitional(), transport="legacy")):
        buffer = driver.echoq.add(b"hello", 5)
        driver.echoq.publish()
        driver.echoq.notify(size=size)
        buffer.wait()


def calls_of(step: Callable[[], object]) -> int:
    """How many function calls a step makes, Python's and C's."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def start_and_stop_calls(queues: int) -> tuple[int, int]:
    with Guest(ioeventfd=True, memory=64 << 20) as guest:
        driver = guest.plug(Transitional(queues, size=2), start=False, vectors=3)
        driver.negotiate()
        driver.set_up()
        start = calls_of(lambda: setattr(driver, "status", driver.status | Status.DRIVER_OK))
        assert len(guest.accel.ioeventfds) == 2 * queues
        assert guest.accel.assigns == 2 * queues
        stop = calls_of(lambda: setattr(driver, "status", Status(0)))
        assert guest.accel.ioeventfds == set()
        return start, stop


def test_a12_1024_queues_cost_16_times_64() -> None:
    few, many = start_and_stop_calls(64), start_and_stop_calls(1024)
    for small, large in zip(few, many, strict=True):
        assert large <= 17 * small


def test_a12_the_last_assign_of_1024_fails_and_all_are_undone() -> None:
    with Guest(ioeventfd=True, memory=64 << 20) as guest:
        guest.accel.fail_ioeventfd_at = {2047: errno.ENOSPC}
        driver = guest.plug(Transitional(1024, size=4), vectors=3)
        assert guest.accel.ioeventfds == set()
        assert echo(driver.echoq[1023]) == b"hello"


def test_a13_counters_of_a_synchronous_queue(guest: Guest) -> None:
    driver = guest.plug(Echo(), ioeventfd=False, event_idx=False)
    for _ in range(5):
        echo(driver.echoq)
    driver.echoq.ring.avail_flags = 1
    driver.echoq.polling = True
    echo(driver.echoq)
    counters = queues_of(driver)[0].counters
    assert counters["notifies"] == 6
    assert counters["chains"] == 6
    assert counters["interrupts"] == driver.echoq.interrupts == 5
    assert counters["suppressed"] == 1
    assert (counters["kicks"], counters["wakeups"]) == (0, 0)


def test_a13_counters_of_a_queue_with_ioeventfd(guest: Guest) -> None:
    driver = guest.plug(Echo(), ioeventfd=True)
    for _ in range(20):
        buffer = driver.echoq.add(b"x", 1)
        driver.echoq.publish()
        driver.echoq.notify()
        buffer.wait()
    vq = queues_of(driver)[0]
    assert vq.counters["chains"] == 20
    assert vq.counters["notifies"] == 0
    assert vq.counters["wakeups"] >= 1
    wait_for_kicks(vq, 20)
    assert vq.counters["kicks"] >= vq.counters["wakeups"]


def test_a13_counters_survive_a_reset(guest: Guest) -> None:
    driver = guest.plug(Echo())
    echo(driver.echoq)
    driver.start()
    echo(driver.echoq)
    assert queues_of(driver)[0].counters["chains"] == 2


def test_one_kick_of_many_queues_wakes_only_that_one(guest: Guest) -> None:
    driver = guest.plug(Echo(4), ioeventfd=True)
    for vq in queues_of(driver):
        wait_for_kicks(vq, 1)  # those of the attach
    before = [vq.counters["kicks"] for vq in queues_of(driver)]
    echo(driver.echoq[2])
    after = [vq.counters["kicks"] for vq in queues_of(driver)]
    assert [new - old for old, new in zip(before, after, strict=True)] == [0, 0, 1, 0]
