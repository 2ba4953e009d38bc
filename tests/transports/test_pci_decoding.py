"""Notify addresses that move or go away: BARs, decoding bits, bus mastering, unplug, and reset of the function."""

import threading
from collections.abc import Callable

import pytest

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.devices.rng import Rng
from pyvirtio.spec import DeviceId
from pyvirtio.testing import Guest
from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.pci import BUS_MASTER, IO, MEMORY
from pyvirtio.transports.base import IoAddress

ADVANCED_FEATURES = 0x13
LEGACY, PIO_NOTIFY, MODERN = 0, 2, 4


class Echoes(Device, id=DeviceId.CONSOLE):
    """A device with three queues that give back what they get."""

    @queue(size=8, count=3)
    def echoq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.complete()


def serves(driver: VirtioDriver, index: int = 0) -> bool:
    vq = driver.queues[index]
    buffer = vq.add(writable=16)
    vq.kick()
    buffer.wait()
    return True


def assigned(guest: Guest) -> set[IoAddress]:
    return guest.accel.ioeventfds


def function_level_reset(driver: VirtioDriver) -> None:
    offset = driver.pci.capability(ADVANCED_FEATURES)
    assert offset is not None
    assert driver.pci.read(offset + 3, 1) & 2, "FLR is offered"
    driver.pci.write(offset + 4, 1, 1)


def place_again(driver: VirtioDriver) -> None:
    """What an operating system does after a reset of the function: put the configuration back."""
    for index, window in driver.pci.bars.items():
        driver.pci.move_bar(index, window.base)
    driver.pci.command = IO | MEMORY | BUS_MASTER


@pytest.mark.parametrize("properties", [{}, {"page_per_vq": True}, {"modern_pio_notify": True}])
def test_every_notify_address_is_an_ioeventfd(guest: Guest, properties: dict[str, bool]) -> None:
    echoes = guest.plug(Echoes(), **properties)  # type: ignore[arg-type]
    base = {index: window.base for index, window in echoes.pci.bars.items()}
    expected = {IoAddress("pio", base[LEGACY] + 16, 2, index) for index in range(3)}
    expected |= {IoAddress("mmio", base[MODERN] + echoes.registers.notifier(index)[1], 0) for index in range(3)}
    if "modern_pio_notify" in properties:
        expected |= {IoAddress("pio", base[PIO_NOTIFY], 2, index) for index in range(3)}
    assert assigned(guest) == (expected if guest.ioeventfd else set())


def test_all_addresses_of_a_queue_reach_it_without_an_exit(guest: Guest) -> None:
    echoes = guest.plug(Echoes(), modern_pio_notify=True)
    vq = echoes.queues[1]
    ways: list[Callable[[], None]] = [
        lambda: echoes.pci.bars[LEGACY].write(16, 2, 1),
        lambda: echoes.pci.bars[PIO_NOTIFY].write(0, 2, 1),
        lambda: echoes.pci.bars[MODERN].write(echoes.notifiers[1][1], 2, 1),
        lambda: echoes.pci.bars[MODERN].write(echoes.notifiers[1][1], 4, 1),
    ]
    for way in ways:
        buffer = vq.add(b"x")
        vq.publish()
        way()
        buffer.wait()
    assert echoes.function.dataplane.queues[1].counters["notifies"] == (0 if guest.ioeventfd else len(ways))


@pytest.mark.parametrize("disabled", ["disable_legacy", "disable_modern"])
def test_only_interfaces_that_exist_have_ioeventfds(guest: Guest, disabled: str) -> None:
    transport = "modern" if disabled == "disable_legacy" else "legacy"
    guest.plug(Echoes(), transport=transport, **{disabled: True})  # type: ignore[arg-type]
    spaces = {at.space for at in assigned(guest)}
    assert spaces == ({"mmio" if transport == "modern" else "pio"} if guest.ioeventfd else set())


def test_a_bar_moves_and_the_ioeventfds_follow(guest: Guest) -> None:
    echoes = guest.plug(Echoes())
    old = assigned(guest)
    buffers = [vq.add(b"x") for vq in echoes.queues]
    for vq in echoes.queues:
        vq.publish()
    for _ in range(3):
        for bar in (LEGACY, MODERN):
            echoes.pci.move_bar(bar, guest.windows[echoes.pci.bars[bar].space].allocate(echoes.pci.sizes[bar]))
    assert len(assigned(guest)) == len(old)
    assert assigned(guest).isdisjoint(old)
    for vq, buffer in zip(echoes.queues, buffers, strict=True):
        vq.notify()
        buffer.wait()


def test_a_bar_that_moves_to_and_fro_under_load_loses_no_kick(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes))
    places = [rng.pci.bars[MODERN].base, guest.windows["mmio"].allocate(rng.pci.sizes[MODERN])]
    for turn in range(50):
        buffer = rng.requestq.add(writable=16)
        if rng.requestq.publish():
            rng.requestq.notify()
        rng.pci.move_bar(MODERN, places[turn % 2])
        buffer.wait()


def test_the_old_place_of_a_bar_is_free_for_another_device(guest: Guest) -> None:
    first = guest.plug(Rng(source=bytes))
    place = first.pci.bars[MODERN].base
    first.pci.move_bar(MODERN, guest.windows["mmio"].allocate(first.pci.sizes[MODERN]))
    second = guest.plug(Rng(source=bytes))
    second.pci.move_bar(MODERN, place)
    assert serves(first)
    assert serves(second)
    assert second.function.dataplane.notifiers.reasons == {}


@pytest.mark.parametrize(("command", "left"), [(IO | BUS_MASTER, "pio"), (MEMORY | BUS_MASTER, "mmio")])
def test_a_decoding_bit_that_is_cleared_takes_its_ioeventfds_away(guest: Guest, command: int, left: str) -> None:
    echoes = guest.plug(Echoes())
    before = assigned(guest)
    echoes.pci.command = command
    assert assigned(guest) == {at for at in before if at.space == left}
    echoes.pci.command = IO | MEMORY | BUS_MASTER
    assert assigned(guest) == before
    assert all(serves(echoes, index) for index in range(3))


def test_sizing_a_bar_while_the_device_runs_loses_nothing(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes))
    before = assigned(guest)
    base = rng.pci.bars[MODERN].base
    rng.pci.write(0x20, 4, 0xFFFFFFFF)
    assert rng.pci.read(0x20, 4) == 0xFFFFC00C
    buffer = rng.requestq.add(writable=16)
    rng.requestq.publish()
    rng.pci.write(0x20, 4, base)
    assert assigned(guest) == before
    rng.requestq.notify()
    assert buffer.wait() == bytes(16)


def test_without_bus_mastering_nothing_is_read_or_written(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes))
    assert serves(rng)
    rng.pci.command = IO | MEMORY
    assert assigned(guest) == set()
    buffer = rng.requestq.add(writable=16)
    rng.requestq.publish()
    with guest.only_writes():
        rng.requestq.notify()
        rng.pci.bars[LEGACY].write(16, 2, 0)
    rng.pci.command = IO | MEMORY | BUS_MASTER
    assert buffer.wait() == bytes(16), "what was made available meanwhile is served"
    assert serves(rng)


def test_driver_ok_without_bus_mastering_runs_once_that_is_on(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes), start=False)
    rng.pci.command = IO | MEMORY
    rng.start()
    assert assigned(guest) == set()
    buffer = rng.requestq.add(writable=16)
    rng.requestq.kick()
    rng.pci.command = IO | MEMORY | BUS_MASTER
    assert buffer.wait() == bytes(16)


def test_bus_mastering_off_and_on_many_times(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes), indirect=True)
    for _ in range(100):
        rng.pci.command = IO | MEMORY
        rng.pci.command = IO | MEMORY | BUS_MASTER
        assert serves(rng)
    assert rng.requestq.ring.used_idx == 100


@pytest.mark.parametrize("transport", ["modern", "legacy"])
def test_a_function_level_reset_forgets_everything(guest: Guest, transport: str) -> None:
    rng = guest.plug(Rng(source=bytes), transport=transport)  # type: ignore[arg-type]
    function_level_reset(rng)
    assert assigned(guest) == set()
    assert guest.accel.routes == {}
    assert rng.pci.command == 0
    assert rng.pci.bar_address(MODERN) == 0
    assert rng.msix is not None
    assert rng.msix.control & rng.msix.ENABLE == 0
    place_again(rng)
    assert rng.status == 0
    rng.start()
    assert serves(rng)


def test_a_bus_reset_is_the_same(guest: Guest) -> None:
    rng, other = guest.plug(Rng(source=bytes)), guest.plug(Rng(source=bytes))
    guest.bus.reset()
    assert assigned(guest) == set()
    for driver in (rng, other):
        place_again(driver)
        driver.start()
        assert serves(driver)


def test_unplugging_takes_the_ioeventfds_down(guest: Guest) -> None:
    rng, other = guest.plug(Rng(source=bytes)), guest.plug(Rng(source=bytes))
    gone = set(rng.function.notify_addresses(0))
    guest.unplug(rng)
    assert assigned(guest).isdisjoint(gone)
    assert serves(other)


class Slow(Device, id=DeviceId.CONSOLE):
    """A device whose handler is held back by the test."""

    def __init__(self) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.resets = 0

    @queue(size=8)
    def slowq(self, vq: VirtQueue) -> None:
        for chain in vq:
            self.entered.set()
            self.go_on.wait(10)
            chain.complete()

    def reset(self) -> None:
        self.resets += 1


def stop_by_status(driver: VirtioDriver) -> None:
    driver.common.device_status = 0


def stop_by_bus_master(driver: VirtioDriver) -> None:
    driver.function.config_write(4, 2, IO | MEMORY)


def stop_by_unplug(driver: VirtioDriver) -> None:
    driver.function.reset()


@pytest.mark.parametrize("stop", [stop_by_status, stop_by_bus_master, stop_by_unplug, function_level_reset])
def test_a_stop_waits_for_io_in_flight_and_a_read_does_not(guest: Guest, stop: Callable[[VirtioDriver], None]) -> None:
    device = Slow()
    slow, other = guest.plug(device), guest.plug(Rng(source=bytes), ioeventfd=False)
    slow.slowq.add(b"x")
    slow.slowq.publish()
    kick = threading.Thread(target=slow.slowq.notify)
    stopping = threading.Thread(target=stop, args=[slow])
    kick.start()
    assert device.entered.wait(10)
    ring = slow.slowq.ring
    stopping.start()
    stopping.join(0.05)
    assert stopping.is_alive()
    assert slow.pci.read(0, 2) == 0x1AF4
    assert slow.function.bar_read(MODERN, 20, 1) & 0xF == 0xF, "the status reads 0 only when the reset is done"
    assert serves(other)
    device.go_on.set()
    for thread in (stopping, kick):
        thread.join(10)
        assert not thread.is_alive()
    assert ring.used_idx == 1
    if stop is not stop_by_bus_master:
        assert device.resets == 1
        assert slow.function.bar_read(MODERN, 20, 1) == 0


def test_reset_while_the_notifiers_are_grabbed(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes))
    notifiers = rng.function.dataplane.notifiers
    notifiers.grab([0], lambda _: lambda: None)
    assert assigned(guest)
    rng.reset()
    assert assigned(guest) == set()
    notifiers.release([0])
    rng.start()
    assert serves(rng)


def test_the_property_can_be_switched_while_the_guest_runs(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes))
    for turn in range(20):
        rng.function.ioeventfd = bool(turn % 2)
        assert bool(assigned(guest)) == rng.function.ioeventfd
        assert serves(rng)


def test_two_devices_on_one_address_fall_back_to_exits(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    first = guest.plug(Rng(source=bytes), disable_legacy=True)
    second = guest.plug(Rng(source=bytes), disable_legacy=True, start=False)
    second.negotiate()
    second.set_up()
    second.function.config_write(0x20, 4, first.pci.bars[MODERN].base)
    second.function.bar_write(MODERN, 20, 1, 0xF)
    if guest.ioeventfd:
        assert "EEXIST" in second.function.dataplane.notifiers.mode(0)
        assert "EEXIST" in caplog.text
    assert serves(first)
