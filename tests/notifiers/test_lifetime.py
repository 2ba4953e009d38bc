"""Host notifiers: which addresses they have, when they are there, and where they go when BARs move."""

import errno
from collections.abc import Callable

import pytest
from notified import (
    Echo,
    Transitional,
    Vhost,
    echo,
    function_level_reset,
    modes,
    notifiers_of,
    queues_of,
    wait_for_kicks,
)

from pyvirtio.spec import Status
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.pci import BUS_MASTER, IO, MEMORY
from pyvirtio.testing.registers import Modern
from pyvirtio.transports.base import IoAddress


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


def test_a2_nothing_is_assigned_before_driver_ok(guest: Guest) -> None:
    driver = guest.plug(Echo(), ioeventfd=True, start=False)
    driver.negotiate()
    driver.set_up()
    assert guest.accel.ioeventfds == set()
    driver.status |= Status.DRIVER_OK
    assert len(guest.accel.ioeventfds) == 1


def clear_driver_ok(driver: VirtioDriver) -> None:
    driver.status = driver.status & ~Status.DRIVER_OK


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
