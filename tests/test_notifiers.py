"""How a notification gets from the guest to whoever serves the queue: docs/ioeventfd.md, rule by rule."""

import errno
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from pyvirtio import Device, VirtQueue, queue
from pyvirtio._core import VirtQueue as CoreQueue
from pyvirtio.backends.block import Memory
from pyvirtio.devices.blk import Blk
from pyvirtio.devices.rng import Rng
from pyvirtio.notifiers import HostNotifiers
from pyvirtio.spec import DeviceId, Status
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.pci import BUS_MASTER, IO, MEMORY
from pyvirtio.testing.queue import HANG, Queue
from pyvirtio.testing.registers import PCI_CFG, Modern, structures
from pyvirtio.transports.base import IoAddress

ERRNOS = [errno.ENOSPC, errno.EEXIST, errno.EMFILE]


class Echo(Device, id=63):
    """Echoes on `count` queues and remembers which thread did."""

    size = 16

    def __init__(self, count: int = 1, size: int = 16) -> None:
        self.count, self.size = count, size
        self.threads: set[int] = set()
        self.seen: list[str] = []
        self.watch: Callable[[], object] = lambda: None

    @queue(size="size", count="count")
    def echoq(self, vq: VirtQueue) -> None:
        self.threads.add(threading.get_ident())
        for chain in vq:
            chain.write(chain.read())
            chain.complete()

    def activate(self, features: int) -> None:
        self.seen.append(f"activate {self.watch()}")

    def reset(self) -> None:
        self.seen.append(f"reset {self.watch()}")


class Transitional(Echo, id=DeviceId.ENTROPY):
    """The same, with a device type that has a legacy interface too."""


class Gate(Device, id=63):
    """Its handler waits until it is let through: it keeps the thread that serves it busy."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    @queue(size=16)
    def gateq(self, vq: VirtQueue) -> None:
        self.entered.set()
        assert self.open.wait(HANG)
        for chain in vq:
            chain.complete()


def echo(q: Queue, data: bytes = b"hello") -> bytes:
    buffer = q.add(data, len(data))
    q.kick()
    return buffer.wait()


def queues_of(driver: VirtioDriver) -> list[VirtQueue]:
    return driver.function.dataplane.queues


def notifiers_of(driver: VirtioDriver) -> HostNotifiers:
    return driver.function.dataplane.notifiers


def modes(driver: VirtioDriver) -> list[str]:
    return [notifiers_of(driver).mode(index) for index in range(len(queues_of(driver)))]


# A.1: which addresses


def test_a1_modern_is_one_address_for_each_queue_of_any_length(guest: Guest) -> None:
    driver = guest.plug(Echo(3), ioeventfd=True, disable_legacy=True)
    addresses = [window.base + offset for window, offset in driver.notifiers]
    assert len(set(addresses)) == 3
    assert guest.accel.ioeventfds == {IoAddress("mmio", address, 0, None) for address in addresses}


def test_a1_legacy_is_one_port_and_the_queue_number(guest: Guest) -> None:
    driver = guest.plug(Transitional(3), ioeventfd=True, transport="legacy", disable_modern=True)
    port = driver.pci.bars[0].base + 16
    assert guest.accel.ioeventfds == {IoAddress("pio", port, 2, index) for index in range(3)}


def test_a1_transitional_has_both_and_each_signals_the_same_eventfd(guest: Guest) -> None:
    driver = guest.plug(Transitional(2), ioeventfd=True, modern_pio_notify=True)
    assert isinstance(driver.registers, Modern)
    assert len(guest.accel.ioeventfds) == 6
    for index, vq in enumerate(queues_of(driver)):
        pio_window, pio_offset = driver.registers.notifier(index, 1)
        for window, offset in (driver.notifiers[index], (driver.pci.bars[0], 16), (pio_window, pio_offset)):
            before, exits = vq.counters, guest.accel.exits
            window.write(offset, 2, index)
            wait_for_kicks(vq, before["kicks"] + 1)
            assert vq.counters["notifies"] == before["notifies"]
            assert guest.accel.exits == exits


def test_a1_page_per_vq_puts_each_queue_on_its_own_page(guest: Guest) -> None:
    driver = guest.plug(Echo(3), ioeventfd=True, page_per_vq=True)
    pages = {(window.base + offset) // 4096 for window, offset in driver.notifiers}
    assert len(pages) == 3
    assert {at.address // 4096 for at in guest.accel.ioeventfds} == pages
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 3


def wait_for_kicks(vq: VirtQueue, kicks: int) -> None:
    """Sleep until the I/O thread has read that many from the eventfd."""
    deadline = time.monotonic() + HANG
    while vq.counters["kicks"] < kicks:
        assert time.monotonic() < deadline
        time.sleep(0.001)


# A.2: lifetime


def test_a2_nothing_is_assigned_before_driver_ok(guest: Guest) -> None:
    driver = guest.plug(Echo(), ioeventfd=True, start=False)
    driver.negotiate()
    driver.set_up()
    assert guest.accel.ioeventfds == set()
    driver.status |= Status.DRIVER_OK
    assert len(guest.accel.ioeventfds) == 1


def clear_driver_ok(driver: VirtioDriver) -> None:
    driver.status = driver.status & ~Status.DRIVER_OK


def function_level_reset(driver: VirtioDriver) -> None:
    advanced_features = driver.pci.capability(0x13)
    assert advanced_features is not None
    driver.pci.write(advanced_features + 4, 1, 1)


def clear_bus_master(driver: VirtioDriver) -> None:
    driver.pci.command = IO | MEMORY


@pytest.mark.parametrize(
    "end", [clear_driver_ok, VirtioDriver.reset, function_level_reset, clear_bus_master], ids=lambda end: end.__name__
)
def test_a2_the_notifiers_go_down_with_the_driver(guest: Guest, end: Callable[[VirtioDriver], None]) -> None:
    driver = guest.plug(Echo(2), ioeventfd=True)
    assert modes(driver) == ["ioeventfd"] * 2
    end(driver)
    assert guest.accel.ioeventfds == set()
    assert not notifiers_of(driver).running


def test_a2_bus_master_again_goes_on_where_it_stopped(guest: Guest) -> None:
    driver = guest.plug(Echo())
    for n in range(20):
        driver.pci.command = IO | MEMORY
        driver.pci.command = IO | MEMORY | BUS_MASTER
        assert echo(driver.echoq, b"%d" % n) == b"%d" % n


def test_a2_a_kick_without_bus_master_is_served_when_it_is_back(guest: Guest) -> None:
    driver = guest.plug(Echo())
    driver.pci.command = IO | MEMORY
    buffer = driver.echoq.add(b"later", 5)
    with guest.only_writes((driver.echoq.ring.avail, 64)):
        driver.echoq.publish()
        driver.echoq.notify()
    driver.pci.command = IO | MEMORY | BUS_MASTER
    assert buffer.wait() == b"later"


def test_a2_legacy_queue_address_0_takes_that_queue_down(guest: Guest) -> None:
    driver = guest.plug(Transitional(2), ioeventfd=True, transport="legacy")
    driver.common.queue_select = 0
    driver.common.queue_address = 0
    assert {at.datamatch for at in guest.accel.ioeventfds if at.space == "pio"} == {1}
    assert modes(driver) == ["-", "ioeventfd"]


def test_a2_unplug_takes_them_down(guest: Guest) -> None:
    driver = guest.plug(Echo(2), ioeventfd=True)
    guest.unplug(driver)
    assert guest.accel.ioeventfds == set()


def test_a2_the_device_is_active_before_and_after_the_notifiers(guest: Guest) -> None:
    device = Echo(2)
    device.watch = lambda: len(guest.accel.ioeventfds)
    driver = guest.plug(device, ioeventfd=True)
    driver.reset()
    assert device.seen == ["activate 0", "reset 0"]


# A.3: idempotent


def test_a3_driver_ok_again_assigns_nothing(guest: Guest) -> None:
    driver = guest.plug(Echo(2), ioeventfd=True)
    assigns, there = guest.accel.assigns, guest.accel.ioeventfds
    driver.status |= Status.DRIVER_OK
    notifiers_of(driver).start()
    driver.function.ioeventfd = True
    assert (guest.accel.assigns, guest.accel.ioeventfds) == (assigns, there)
    assert echo(driver.echoq[1]) == b"hello"


def test_a3_starting_again_does_not_try_again_what_failed(guest: Guest) -> None:
    guest.accel.fail_ioeventfd_at = {0: errno.ENOSPC}
    driver = guest.plug(Echo(2), ioeventfd=True)
    assigns = guest.accel.assigns
    notifiers_of(driver).start()
    assert guest.accel.assigns == assigns
    assert all("ENOSPC" in mode for mode in modes(driver))


def test_a3_stopping_twice_is_stopping_once(guest: Guest) -> None:
    driver = guest.plug(Echo(2), ioeventfd=True)
    for _ in range(2):
        notifiers_of(driver).stop()
        assert guest.accel.ioeventfds == set()
    notifiers_of(driver).start()
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 2


# A.4: failure


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("k", range(8))
def test_a4_assign_k_fails(guest: Guest, caplog: pytest.LogCaptureFixture, k: int, number: int) -> None:
    """Four queues with a port and an address each: any of the eight may be the one that fails."""
    device = Transitional(4)
    other = guest.plug(Echo(), ioeventfd=True)
    there, exits = guest.accel.ioeventfds, guest.accel.exits
    guest.accel.assigns = 0
    guest.accel.fail_ioeventfd_at = {k: number}
    driver = guest.plug(device, ioeventfd=True)
    name = errno.errorcode[number]
    assert guest.accel.ioeventfds == there, "exactly the steps that were taken are undone"
    assert modes(driver)[k // 2] == f"sync ({name}: {os.strerror(number)})"
    assert all(mode.startswith("sync (") for mode in modes(driver))
    assert driver.function.ioeventfd, "the property keeps what the user asked for"
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "transitional1" in warning
    assert f"echoq{k // 2}" in warning
    assert name in warning
    for index, q in enumerate(driver.echoq):
        assert echo(q) == b"hello", f"queue {index} is served synchronously"
        assert queues_of(driver)[index].counters["notifies"] == 1
    assert guest.accel.exits > exits
    assert echo(other.echoq) == b"hello"
    guest.accel.fail_ioeventfd_at = {}
    driver.start()
    assert modes(driver) == ["ioeventfd"] * 4, "the next DRIVER_OK tries again"
    assert len(guest.accel.ioeventfds - there) == 8
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 4


@pytest.mark.parametrize("k", range(4))
def test_a4_the_io_thread_refuses_queue_k(guest: Guest, k: int) -> None:
    refusing = RefusingPoll(guest, at=k)
    driver = guest.plug(Echo(4), ioeventfd=True, start=False)
    notifiers_of(driver)._poll = refusing.poll
    driver.start()
    assert guest.accel.ioeventfds == set()
    assert refusing.polled == 0
    assert modes(driver)[k] == f"sync (ENOSPC: {os.strerror(errno.ENOSPC)})"
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 4
    refusing.at = -1
    driver.start()
    assert modes(driver) == ["ioeventfd"] * 4
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 4


class RefusingPoll:
    """The I/O thread's `poll`, which refuses one queue as epoll does at its limit of watches."""

    def __init__(self, guest: Guest, at: int) -> None:
        self.iothread, self.at, self.polled = guest.iothread, at, 0

    def poll(self, vq: VirtQueue) -> Callable[[], object]:
        if vq.index == self.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        undo = self.iothread.poll(vq)
        self.polled += 1

        def undone() -> None:
            self.polled -= 1
            undo()

        return undone


def test_a4_buffers_made_available_before_the_failure_are_served(guest: Guest) -> None:
    guest.accel.fail_ioeventfd_at = {1: errno.ENOSPC}
    driver = guest.plug(Echo(2), ioeventfd=True, start=False)
    driver.negotiate()
    driver.set_up()
    buffers = [q.add(b"early", 5) for q in driver.echoq]
    for q in driver.echoq:
        q.publish()
    driver.status |= Status.DRIVER_OK
    assert [buffer.wait() for buffer in buffers] == [b"early"] * 2


# A.5: the property


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


def test_a5_no_kick_is_lost_while_it_flips_under_load(guest: Guest) -> None:
    driver = guest.plug(Echo(2, size=64))
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


def test_a5_every_kick_is_counted_while_it_flips(guest: Guest) -> None:
    """Each notify either exits or signals the eventfd, and each signal is read once."""
    driver = guest.plug(Echo())
    vq = queues_of(driver)[0]
    for n in range(200):
        if n % 10 == 0:
            driver.function.ioeventfd = not driver.function.ioeventfd
        driver.echoq.notify()
    driver.function.ioeventfd = False
    assert vq.counters["notifies"] == 100
    wait_for_kicks(vq, 100)


# A.6: attach leaves it signalled, detach serves the last kick


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


# A.7: kernel vhost borrows the notifiers


class Vhost:
    """Stands in for kernel vhost: serves a queue of a device from its ring's position on, woken by the kick eventfd.

    Like vhost it is given the ring and the eventfds and knows nothing of the device. The queue of the device keeps
    its ring meanwhile, which nobody serves, and gets the positions back.
    """

    def __init__(self, driver: VirtioDriver, index: int = 0) -> None:
        self.driver, self.index = driver, index
        self.served = 0
        dataplane, setup = driver.function.dataplane, driver.function.driver.setups[index]
        self.vq = dataplane.queues[index]
        self.own = CoreQueue(dataplane.state, f"vhost{index}", index, setup.size)
        self.ring: dict[str, Any] = {"size": setup.size, "desc": setup.desc, "avail": setup.avail, "used": setup.used}
        self.ring["event_idx"] = driver.echoq.ring.event_idx if index == 0 and len(driver.queues) == 1 else False
        self.stopped = os.eventfd(0)
        self.thread = threading.Thread(target=self.run)

    def take(self) -> None:
        notifiers_of(self.driver).grab()
        next_avail, next_used = self.restart(*self.vq.stop())
        interrupts = self.driver.function.interrupts
        vector = interrupts.msix.vector(interrupts.queue_vectors[self.index]) if interrupts.msix else None
        self.own.set_interrupt(interrupts.isr, vector)
        self.own.start(self.driver.guest.memory, self.handle, next_avail=next_avail, next_used=next_used, **self.ring)
        self.thread.start()

    def give_back(self) -> None:
        os.eventfd_write(self.stopped, 1)
        self.thread.join()
        os.close(self.stopped)
        self.vq.stop()
        self.restart(*self.own.stop())
        notifiers_of(self.driver).release()

    def restart(self, next_avail: int, next_used: int) -> tuple[int, int]:
        handler = self.driver.function.device.queues[self.index].handler
        self.vq.start(self.driver.guest.memory, handler, next_avail=next_avail, next_used=next_used, **self.ring)
        return next_avail, next_used

    def run(self) -> None:
        poll = select.poll()
        poll.register(self.vq.kick_fd, select.POLLIN)
        poll.register(self.stopped, select.POLLIN)
        self.own.service()
        while self.stopped not in [fd for fd, _ in poll.poll()]:
            with suppress(BlockingIOError):
                os.eventfd_read(self.vq.kick_fd)
            self.own.service()

    def handle(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.read()
            chain.write(b"vhost")
            chain.complete()
            self.served += 1


def test_a7_vhost_serves_while_it_has_the_notifiers(guest: Guest) -> None:
    """Also with ioeventfd off, and twice in a row."""
    device = Echo()
    driver = guest.plug(device)
    own_mode = modes(driver)
    for _ in range(2):
        assert echo(driver.echoq) == b"hello"
        vhost = Vhost(driver)
        vhost.take()
        there = guest.accel.ioeventfds
        assert len(there) == 1
        device.threads.clear()
        for _ in range(20):
            assert echo(driver.echoq) == b"vhost"
        assert device.threads == set()
        vhost.give_back()
        assert vhost.served == 20
        assert echo(driver.echoq) == b"hello"
        assert modes(driver) == own_mode


def test_a7_a_kick_during_the_give_back_is_served(guest: Guest) -> None:
    driver = guest.plug(Echo())
    for _ in range(20):
        vhost = Vhost(driver)
        vhost.take()
        buffers = [driver.echoq.add(b"hello", 5)]
        driver.echoq.kick()
        vhost.give_back()
        buffers.append(driver.echoq.add(b"hello", 5))
        driver.echoq.kick()
        assert {buffer.wait() for buffer in buffers} <= {b"hello", b"vhost"}


def test_a7_a_kick_that_vhost_took_and_did_not_serve_is_served(guest: Guest) -> None:
    driver = guest.plug(Echo())
    vq = queues_of(driver)[0]
    notifiers_of(driver).grab()
    buffer = driver.echoq.add(b"hello", 5)
    driver.echoq.publish()
    driver.echoq.notify()
    wait_for_quiet(guest)
    assert os.eventfd_read(vq.kick_fd) > 0
    notifiers_of(driver).release()
    assert buffer.wait() == b"hello"


def wait_for_quiet(guest: Guest) -> None:
    """Let the I/O thread finish what it is at: it serves one queue after the other."""
    assert echo(guest.plug(Echo(), ioeventfd=True).echoq) == b"hello"


def test_a7_grabs_are_counted(guest: Guest) -> None:
    driver = guest.plug(Echo(4))
    notifiers, own_mode, own = notifiers_of(driver), modes(driver), guest.accel.ioeventfds
    notifiers.grab()
    there, assigns = guest.accel.ioeventfds, guest.accel.assigns
    notifiers.grab()
    assert (guest.accel.ioeventfds, guest.accel.assigns) == (there, assigns)
    assert len(there) == 4
    notifiers.release()
    assert modes(driver) == ["vhost"] * 4
    notifiers.release()
    assert modes(driver) == own_mode
    assert guest.accel.ioeventfds == own


def test_a7_a_grab_that_cannot_assign_lends_nothing(guest: Guest) -> None:
    driver = guest.plug(Echo(4), ioeventfd=False)
    guest.accel.assigns = 0
    guest.accel.fail_ioeventfd_at = {2: errno.ENOSPC}
    with pytest.raises(OSError, match="No space"):
        notifiers_of(driver).grab()
    assert guest.accel.ioeventfds == set()
    assert not notifiers_of(driver).grabbed
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 4


def test_a7_flipping_the_property_does_not_take_them_from_vhost(guest: Guest) -> None:
    driver = guest.plug(Echo())
    vhost = Vhost(driver)
    vhost.take()
    wanted = driver.function.ioeventfd
    for value in (not wanted, wanted):
        driver.function.ioeventfd = value
        assert len(guest.accel.ioeventfds) == 1
        assert echo(driver.echoq) == b"vhost"
    vhost.give_back()
    assert echo(driver.echoq) == b"hello"


def test_a7_a_reset_while_vhost_holds_them(guest: Guest) -> None:
    driver = guest.plug(Echo())
    notifiers_of(driver).grab()
    driver.reset()
    assert guest.accel.ioeventfds == set()
    notifiers_of(driver).release()
    driver.start()
    assert echo(driver.echoq) == b"hello"


# A.8: a notify that reaches userspace


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


# A.9: queues that are not there


def test_a9_a_queue_without_a_ring_is_skipped(guest: Guest) -> None:
    driver = guest.plug(Echo(3), start=False)
    driver.negotiate()
    driver.set_up()
    driver.status = Status(0)
    driver.queues.clear()
    driver.negotiate()
    sources = driver._set_up_msix()
    for index in (0, 2):
        driver.queues.append(driver.set_up_queue(index, f"q{index}", sources[1 + index]))
        driver.notifiers.append(driver.registers.notifier(index))
    driver.status |= Status.DRIVER_OK
    running = "ioeventfd" if driver.function.ioeventfd else "sync"
    assert modes(driver) == [running, "-", running]
    assert len(guest.accel.ioeventfds) == 2 * driver.function.ioeventfd
    driver.queues[1].index = 1  # its place among the two notifiers
    assert [echo(q) for q in driver.queues] == [b"hello"] * 2


@pytest.mark.parametrize("number", [1, 7, 0x7FFF, 0xFFFF])
def test_a9_a_notify_for_a_queue_that_does_not_exist_is_ignored(guest: Guest, number: int) -> None:
    """CVE-2011-2512."""
    for driver in (guest.plug(Transitional()), guest.plug(Transitional(), transport="legacy")):
        driver.pci.bars[0].write(16, 2, number)
        window, offset = driver.notifiers[0]
        if number < 512 and window.space == "mmio":
            window.write(offset + 4 * number, 2, number)
        assert echo(driver.echoq) == b"hello"


def test_a9_a_stale_kick_after_a_reset_touches_nothing(guest: Guest) -> None:
    device = Echo()
    driver = guest.plug(device)
    ring, buffer = driver.echoq.ring, driver.echoq.add(b"old", 3)
    vq = queues_of(driver)[0]
    window, offset = driver.notifiers[0]
    driver.status = Status(0)
    ring.publish()
    with guest.only_writes():
        vq.signal()
        window.write(offset, 2, 0)
        driver.function.dataplane.notify(0)
    assert ring.used_idx == 0
    assert not buffer.done
    driver.start()
    assert echo(driver.echoq) == b"hello"


def test_a9_a_kick_left_in_the_eventfd_finds_the_new_ring_as_it_is(guest: Guest) -> None:
    driver = guest.plug(Echo())
    for _ in range(10):
        driver.reset()
        queues_of(driver)[0].signal()
        driver.start()
        assert echo(driver.echoq) == b"hello"


# A.10: BARs move


def test_a10_the_ioeventfds_follow_the_bar(guest: Guest) -> None:
    driver = guest.plug(Echo(2), ioeventfd=True)
    old = driver.pci.bars[4].base
    before = guest.accel.ioeventfds
    driver.pci.move_bar(4, new := guest.windows["mmio"].allocate(driver.pci.sizes[4]))
    assert guest.accel.ioeventfds == {IoAddress("mmio", at.address - old + new, 0) for at in before}
    assert [echo(q) for q in driver.echoq] == [b"hello"] * 2


def test_a10_they_are_gone_before_the_old_range_is_free(guest: Guest) -> None:
    driver = guest.plug(Echo(2), ioeventfd=True)
    seen = []
    find_regions = driver.function.decoding_changed

    def watch() -> None:
        seen.append(guest.accel.ioeventfds)
        find_regions()

    driver.function.decoding_changed = watch
    driver.pci.move_bar(4, guest.windows["mmio"].allocate(driver.pci.sizes[4]))
    assert seen
    assert all(there == set() for there in seen)


@pytest.mark.parametrize("bit", [IO, MEMORY])
def test_a10_the_enable_bits_switch_them_too(guest: Guest, bit: int) -> None:
    driver = guest.plug(Transitional(), ioeventfd=True)
    space = "pio" if bit == IO else "mmio"
    everything = guest.accel.ioeventfds
    assert {at.space for at in everything} == {"pio", "mmio"}
    driver.pci.command = (IO | MEMORY | BUS_MASTER) & ~bit
    assert {at.space for at in guest.accel.ioeventfds} == {"pio", "mmio"} - {space}
    driver.pci.command = IO | MEMORY | BUS_MASTER
    assert guest.accel.ioeventfds == everything
    assert echo(driver.echoq) == b"hello"


def test_a10_no_kick_is_lost_while_bars_move(guest: Guest) -> None:
    driver = guest.plug(Echo(size=64))
    for n in range(100):
        buffer = driver.echoq.add(b"%d" % n, 4)
        driver.echoq.kick()
        driver.pci.move_bar(4, guest.windows["mmio"].allocate(driver.pci.sizes[4]))
        assert buffer.wait() == b"%d" % n


def test_a10_a_move_onto_a_taken_address_falls_back(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    first = guest.plug(Echo(), ioeventfd=True)
    second = guest.plug(Echo(), ioeventfd=True)
    home = second.pci.bars[4].base
    second.pci.move_bar(4, first.pci.bars[4].base)
    assert "EEXIST" in modes(second)[0]
    assert "EEXIST" in caplog.text
    assert len(guest.accel.ioeventfds) == 1
    second.pci.move_bar(4, home)
    assert echo(first.echoq) == b"hello"
    assert echo(second.echoq) == b"hello"
    assert "EEXIST" in modes(second)[0], "until the next DRIVER_OK"
    second.start()
    assert modes(second) == ["ioeventfd"]


def test_a10_a_move_onto_a_taken_address_while_vhost_has_them(guest: Guest) -> None:
    """Vhost keeps the eventfds; a notify exits and signals them."""
    first, second = guest.plug(Echo(), ioeventfd=True), guest.plug(Echo())
    home = second.pci.bars[4].base
    vhost = Vhost(second)
    vhost.take()
    second.pci.move_bar(4, first.pci.bars[4].base)
    assert modes(second)[0].startswith("vhost (EEXIST")
    second.pci.move_bar(4, home)
    assert echo(second.echoq) == b"vhost"
    vhost.give_back()
    assert echo(second.echoq) == b"hello"
    second.start()
    assert [echo(driver.echoq) for driver in (first, second)] == [b"hello"] * 2


# A.11: reset keeps the property


def test_a11_reset_keeps_the_property(guest: Guest) -> None:
    driver = guest.plug(Echo())
    wanted = driver.function.ioeventfd
    driver.reset()
    assert driver.function.ioeventfd is wanted
    driver.function.ioeventfd = not wanted
    driver.reset()
    assert driver.function.ioeventfd is not wanted
    function_level_reset(driver)
    assert driver.function.ioeventfd is not wanted


# A.12: many queues


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


# A.13: counters


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
