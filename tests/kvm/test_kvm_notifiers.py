"""Host notifiers of virtio-pci on KVM: a vCPU writes the notify registers, and KVM decides whether that exits."""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import get_args

import pytest
from freestanding import HANG, OUT, STORE, CpuDrivenKvm, KvmGuest

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.spec import DeviceId, Feature, Status
from pyvirtio.testing import Interface, VirtioDriver
from pyvirtio.testing.pci import BUS_MASTER, IO, MEMORY
from pyvirtio.testing.queue import sleep_on
from pyvirtio.testing.ring import WRITE, Desc
from pyvirtio.transports.base import IoAddress

QUEUES = 4
ANY_INTERFACE = pytest.mark.parametrize("transport", get_args(Interface))


class Stamp(Device, id=DeviceId.ENTROPY):
    """Writes its name into each buffer, and remembers which threads it ran on."""

    def __init__(self, count: int = QUEUES) -> None:
        self.count = count
        self.threads: set[str] = set()

    @queue(size=64, count="count")
    def requestq(self, vq: VirtQueue) -> None:
        self.threads.add(threading.current_thread().name)
        for chain in vq:
            chain.write(b"stamp")
            chain.complete()


class Refusing(CpuDrivenKvm):
    """KVM, but the assigns with these numbers fail. Counts what is assigned."""

    fail_at: int | None = None
    code = errno.ENOSPC
    assigns = 0
    assigned = 0

    def assign_ioeventfd(self, fd: int, at: IoAddress) -> Callable[[], None]:
        number, self.assigns = self.assigns, self.assigns + 1
        if number == self.fail_at:
            raise OSError(self.code, os.strerror(self.code))
        undo = super().assign_ioeventfd(fd, at)
        self.assigned += 1

        def unassign() -> None:
            undo()
            self.assigned -= 1

        return unassign


def plug(machine: KvmGuest, device: Device | None = None, **options: object) -> VirtioDriver:
    """Plug a device and start its driver, which polls: interrupts go into a guest that does not take them."""
    start = options.pop("start", True)
    driver = machine.plug(device or Stamp(), msix=False, start=False, **options)  # type: ignore[arg-type]
    driver.negotiate()
    driver.set_up()
    for each in driver.queues:
        each.polling = True
    if start:
        driver.status |= Status.DRIVER_OK
    return driver


def restart(driver: VirtioDriver) -> None:
    """Reset, and DRIVER_OK again."""
    driver.negotiate()
    driver.set_up()
    for each in driver.queues:
        each.polling = True
    driver.status |= Status.DRIVER_OK


def modes(driver: VirtioDriver) -> list[str]:
    return [driver.function.dataplane.notifiers.mode(index) for index in range(len(driver.queues))]


def serve_one(driver: VirtioDriver, index: int = 0) -> int:
    """Have one buffer served; return how many accesses left the guest for its kick."""
    each = driver.queues[index]
    buffer = each.add(writable=8)
    before = driver.guest.accel.cpu.exits  # type: ignore[attr-defined]
    each.kick()
    kick: int = driver.guest.accel.cpu.exits - before  # type: ignore[attr-defined]
    assert buffer.wait(HANG) == b"stamp"
    return kick


@contextmanager
def taken(machine: KvmGuest, at: IoAddress) -> Iterator[None]:
    """Somebody else's ioeventfd stands there."""
    fd = os.eventfd(0)
    undo = machine.accel.assign_ioeventfd(fd, at)
    yield
    undo()
    os.close(fd)


def assert_nothing_assigned(driver: VirtioDriver) -> None:
    """KVM takes an ioeventfd at each notify address of the device, so there is none."""
    for index in range(len(driver.queues)):
        for at in driver.function.notify_addresses(index):
            with taken(driver.guest, at):  # type: ignore[arg-type]
                pass


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.0005)


@ANY_INTERFACE
def test_a_kick_exits_unless_ioeventfd_is_on(machine: KvmGuest, transport: Interface) -> None:
    driver = plug(machine, transport=transport, ioeventfd=False)
    assert [serve_one(driver, index) for index in range(QUEUES)] == [1] * QUEUES
    driver.function.ioeventfd = True
    assert [serve_one(driver, index) for index in range(QUEUES)] == [0] * QUEUES
    driver.function.ioeventfd = False
    assert [serve_one(driver, index) for index in range(QUEUES)] == [1] * QUEUES


def test_the_handler_runs_on_the_thread_that_took_the_kick(machine: KvmGuest) -> None:
    device = Stamp()
    driver = plug(machine, device, ioeventfd=True)
    serve_one(driver)
    assert device.threads == {"pyvirtio test"}
    driver.function.ioeventfd = False
    device.threads.clear()
    serve_one(driver)
    assert device.threads == {threading.current_thread().name}, "this thread runs the vCPU"


def test_a_kick_that_exits_all_the_same_only_signals_the_eventfd(machine: KvmGuest) -> None:
    """A legacy notify with another width does not match the ioeventfd."""
    device = Stamp()
    driver = plug(machine, device, transport="legacy", ioeventfd=True)
    each = driver.queues[0]
    buffer = each.add(writable=8)
    each.publish()
    before = machine.accel.cpu.exits
    each.notify(size=4)
    assert machine.accel.cpu.exits == before + 1
    assert buffer.wait(HANG) == b"stamp"
    assert device.threads == {"pyvirtio test"}


@ANY_INTERFACE
@pytest.mark.parametrize("failing", range(QUEUES))
def test_a_taken_address_leaves_the_device_synchronous(
    machine: KvmGuest, caplog: pytest.LogCaptureFixture, transport: Interface, failing: int
) -> None:
    driver = plug(machine, transport=transport, ioeventfd=True, start=False)
    *_, last = driver.function.notify_addresses(failing)
    with taken(machine, last):
        driver.status |= Status.DRIVER_OK
        reasons = modes(driver)
        assert reasons[failing] == "sync (EEXIST: File exists)"
        assert all(mode.startswith("sync (") and "EEXIST" in mode for mode in reasons)
        assert driver.function.ioeventfd, "what the user asked for stands"
        (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert all(part in warning for part in (driver.name, driver.queues[failing].name, "EEXIST"))
    assert_nothing_assigned(driver)
    assert [serve_one(driver, index) for index in range(QUEUES)] == [1] * QUEUES, "until the next DRIVER_OK"
    restart(driver)
    assert modes(driver) == ["ioeventfd"] * QUEUES
    assert [serve_one(driver, index) for index in range(QUEUES)] == [0] * QUEUES


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EMFILE])
def test_an_assign_that_fails_undoes_what_was_done(machine: KvmGuest, code: int) -> None:
    """Each assign of a device in turn; it has three addresses per queue."""
    accel = machine.accel = Refusing(machine.memory, machine.bus)
    accel.code = code
    driver = plug(machine, ioeventfd=True, modern_pio_notify=True)
    assert accel.assigned == 3 * QUEUES
    for number in range(3 * QUEUES):
        accel.fail_at, accel.assigns = number, 0
        restart(driver)
        assert (accel.assigned, accel.assigns) == (0, number + 1)
        assert_nothing_assigned(driver)
        assert modes(driver)[number // 3] == f"sync ({errno.errorcode[code]}: {os.strerror(code)})"
        assert serve_one(driver, number // 3) == 1
    accel.fail_at = None
    restart(driver)
    assert (accel.assigned, modes(driver)) == (3 * QUEUES, ["ioeventfd"] * QUEUES)


def test_a_repeated_driver_ok_assigns_nothing_twice(machine: KvmGuest) -> None:
    accel = machine.accel = Refusing(machine.memory, machine.bus)
    driver = plug(machine, ioeventfd=True)
    before = accel.assigns
    driver.status |= Status.DRIVER_OK
    assert accel.assigns == before
    assert serve_one(driver) == 0


def test_a_reset_takes_the_ioeventfds_away(machine: KvmGuest) -> None:
    driver = plug(machine, ioeventfd=True)
    queues = list(driver.queues)
    driver.status = Status(0)
    driver.queues = queues
    assert_nothing_assigned(driver)


@pytest.mark.parametrize("bar", [0, 4])
def test_the_ioeventfds_follow_a_bar_that_moves(machine: KvmGuest, bar: int) -> None:
    transport: Interface = "modern" if bar == 4 else "legacy"
    driver = plug(machine, transport=transport, ioeventfd=True)
    window = driver.pci.bars[bar]
    old = window.base
    *_, old_address = [at for at in driver.function.notify_addresses(0) if at.space == window.space]
    new = machine.windows[window.space].allocate(driver.pci.sizes[bar])
    driver.pci.move_bar(bar, new)
    machine.windows[window.space].free(old, driver.pci.sizes[bar])
    assert [serve_one(driver, index) for index in range(QUEUES)] == [0] * QUEUES
    with taken(machine, old_address):
        pass


@ANY_INTERFACE
def test_without_decoding_there_is_no_ioeventfd(machine: KvmGuest, transport: Interface) -> None:
    driver = plug(machine, transport=transport, ioeventfd=True)
    addresses = [at for index in range(QUEUES) for at in driver.function.notify_addresses(index)]
    driver.pci.command = BUS_MASTER
    for at in addresses:
        with taken(machine, at):
            pass
    driver.pci.command = BUS_MASTER | IO | MEMORY
    assert [serve_one(driver, index) for index in range(QUEUES)] == [0] * QUEUES


def test_vhost_borrows_the_ioeventfds_and_gives_them_back(machine: KvmGuest) -> None:
    driver = plug(machine, ioeventfd=False)
    notifiers = driver.function.dataplane.notifiers
    notifiers.grab([0], lambda _: lambda: None)
    vq, each = driver.function.dataplane.queues[0], driver.queues[0]
    os.eventfd_read(vq.kick_fd)  # what vhost does
    buffer = each.add(writable=8)
    before = machine.accel.cpu.exits
    each.kick()
    assert machine.accel.cpu.exits == before
    assert os.eventfd_read(vq.kick_fd) == 1
    assert not each.ring.used_idx, "nobody here serves it"
    notifiers.release([0])
    vq.service()  # what whoever gives the queue back does
    assert buffer.wait(HANG) == b"stamp"
    assert serve_one(driver) == 1


def test_64_queues_have_an_ioeventfd_each(machine: KvmGuest) -> None:
    driver = plug(machine, Stamp(64), ioeventfd=True, page_per_vq=True)
    assert [serve_one(driver, index) for index in (0, 1, 31, 62, 63)] == [0] * 5
    assert modes(driver) == ["ioeventfd"] * 64


def endless_driver(notify: bytes) -> bytes:
    """Makes the same buffer available again and again, kicks unless told not to, and waits until it is used.

    esi = address of the avail index, edi = of the used index, edx = where to notify.
    """
    wait = (
        b"\x66\x39\x1f"  # wait: cmp [edi], bx
        b"\x75\xfb"  # jne wait
    )
    body = (
        b"\x43"  # inc ebx
        b"\x89\xd8"  # mov eax, ebx
        b"\x66\x87\x06"  # xchg [esi], ax: publishes, and is a full fence
        b"\x66\xf7\x47\xfe\x01\x00"  # test word [edi - 2], NO_NOTIFY
        b"\x75" + bytes([len(notify)]) + notify + wait  # jnz wait
    )
    return body + b"\xeb" + bytes([0x100 - len(body) - 2])  # jmp


NOTIFY = {
    "modern": b"\x66\xc7\x02\x00\x00",  # mov word [edx], 0
    "legacy": b"\x31\xc0" + OUT[2],  # xor eax, eax; out dx, ax
}


@ANY_INTERFACE
@pytest.mark.parametrize("poll_max_ns", [0, 32768])
def test_no_kick_is_lost_while_ioeventfd_is_flipped(machine: KvmGuest, transport: Interface, poll_max_ns: int) -> None:
    """A lost kick is a guest that waits for ever: it makes one request at a time."""
    machine.iothread.loop.poll_max_ns = poll_max_ns
    driver = plug(machine, Stamp(1), transport=transport, features=~Feature.EVENT_IDX, ioeventfd=False)
    vq, ring = driver.function.dataplane.queues[0], driver.queues[0].ring
    ring.write_desc(0, Desc(machine.heap.allocate(16), 16, WRITE))
    window, offset = driver.notifiers[0]
    running = machine.accel.cpu.start(
        endless_driver(NOTIFY[transport]), rsi=ring.avail + 2, rdi=ring.used + 2, rdx=window.base + offset
    )
    try:
        for _ in range(100):
            served = vq.counters["chains"]
            driver.function.ioeventfd = not driver.function.ioeventfd
            wait_for(lambda served=served: vq.counters["chains"] > served + 3, "a kick was lost")  # type: ignore[misc]
    finally:
        running.stop()
    counters = vq.counters
    assert counters["notifies"] > 50
    assert counters["wakeups"] > 50
    driver.queues[0].notify()  # the CPU may have been stopped right before it could
    wait_for(lambda: ring.used_idx == ring.avail_idx, "the last request was not served")


def test_a_pending_kick_is_served_when_the_ioeventfd_goes(machine: KvmGuest) -> None:
    driver = plug(machine, ioeventfd=True)
    function, vq, each = driver.function, driver.function.dataplane.queues[0], driver.queues[0]
    function.dataplane.iothread.loop.remove(vq)
    buffer = each.add(writable=8)
    each.kick()
    assert sleep_on([vq.kick_fd], 0), "the kick is in the eventfd, and nobody polls it"
    function.ioeventfd = False
    assert buffer.wait(HANG) == b"stamp"


def test_widths_other_than_16_bits_notify_too(machine: KvmGuest) -> None:
    driver = plug(machine, ioeventfd=True)
    window, offset = driver.notifiers[1]
    for code in (STORE[1], STORE[2], STORE[4]):
        buffer = driver.queues[1].add(writable=8)
        driver.queues[1].publish()
        before = machine.accel.cpu.exits
        machine.accel.cpu.execute(code, rdi=window.base + offset, rax=1)
        assert machine.accel.cpu.exits == before
        assert buffer.wait(HANG) == b"stamp"
