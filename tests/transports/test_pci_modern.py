"""The common configuration structure, register by register, and what a hostile driver can do with it."""

from collections.abc import Callable

import pytest

from pyvirtio import Device, VirtQueue, queue
from pyvirtio.devices.rng import Rng
from pyvirtio.spec import NO_VECTOR, DeviceId, Status
from pyvirtio.testing import Guest
from pyvirtio.testing.driver import VirtioDriver
from pyvirtio.testing.registers import COMMON
from pyvirtio.testing.ring import WRITE, Desc

QUEUE_REGISTERS = ["queue_size", "queue_enable", "queue_desc", "queue_driver", "queue_device"]


class Pair(Device, id=DeviceId.CONSOLE):
    """A device with two queues that give back what they get."""

    @queue(size=16)
    def firstq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.complete()

    @queue(size=32)
    def secondq(self, vq: VirtQueue) -> None:
        for chain in vq:
            chain.complete()


def negotiated(guest: Guest, device: Device | None = None) -> VirtioDriver:
    """A driver that has set FEATURES_OK and nothing else."""
    driver = guest.plug(device or Pair(), start=False)
    driver.negotiate()
    return driver


def test_each_register_after_a_reset(guest: Guest) -> None:
    common = guest.plug(Pair(), start=False).common
    assert common.num_queues == 2
    assert common.config_msix_vector == common.queue_msix_vector == NO_VECTOR
    assert common.queue_size == 16
    zero = set(COMMON) - {"num_queues", "config_msix_vector", "queue_msix_vector", "queue_size", "device_feature"}
    assert {name: getattr(common, name) for name in zero} == dict.fromkeys(zero, 0)


def test_each_queue_has_its_own_registers(guest: Guest) -> None:
    common = negotiated(guest).common
    for index, size in enumerate((16, 32)):
        common.queue_select = index
        assert common.queue_size == size
        assert common.queue_notify_off == index
        common.queue_desc = 0x1_0000_0000 + index
    for index in range(2):
        common.queue_select = index
        assert common.queue_desc == 0x1_0000_0000 + index


def test_a_64_bit_register_is_two_halves_or_one_access(guest: Guest) -> None:
    common = negotiated(guest).common
    common.write(32, 4, 0x11111111)
    common.write(36, 4, 0x22222222)
    common.write(40, 8, 0x3333333344444444)
    assert common.read(32, 8) == 0x2222222211111111
    assert (common.read(40, 4), common.read(44, 4)) == (0x44444444, 0x33333333)
    common.write(36, 4, 0)
    assert common.queue_desc == 0x11111111


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_reads_of_any_width_and_offset(guest: Guest, size: int) -> None:
    common = negotiated(guest).common
    common.queue_desc = 0x8877665544332211
    whole = common.bytes(0, 64)
    for offset in range(64 - size + 1):
        assert common.read(offset, size) == int.from_bytes(whole[offset : offset + size], "little")


def test_writes_of_another_width_are_ignored(guest: Guest) -> None:
    common = negotiated(guest).common
    before = common.bytes(0, 64)
    for name, (offset, natural) in COMMON.items():
        for size in {1, 2, 4, 8} - {natural} - ({4} if natural == 8 else set()):
            common.write(offset, size, 1)
            assert common.bytes(0, 64) == before, name


def test_read_only_registers_stay(guest: Guest) -> None:
    common = negotiated(guest).common
    before = common.bytes(0, 64)
    for name in ("device_feature", "num_queues", "config_generation", "queue_notify_off"):
        setattr(common, name, 0)
        setattr(common, name, 0xFFFF)
    assert common.bytes(0, 64) == before


def test_what_lies_behind_the_registers(guest: Guest) -> None:
    common = negotiated(guest).common
    common.write(0x100, 4, 0xFFFFFFFF)
    assert common.read(0x100, 4) == 0


@pytest.mark.parametrize("select", [2, 100, 0xFFFFFFFF])
def test_feature_words_beyond_the_end(guest: Guest, select: int) -> None:
    pair = guest.plug(Pair(), start=False)
    pair.common.device_feature_select = pair.common.driver_feature_select = select
    pair.common.driver_feature = 0xFFFFFFFF
    assert pair.common.device_feature == pair.common.driver_feature == 0
    pair.start()


@pytest.mark.parametrize("select", [2, 3, 0xFFFF])
def test_a_queue_that_does_not_exist_reads_0_and_ignores_writes(guest: Guest, select: int) -> None:
    common = negotiated(guest).common
    common.queue_select = select
    for name in [*QUEUE_REGISTERS, "queue_msix_vector", "queue_notify_off"]:
        setattr(common, name, 1)
        assert getattr(common, name) == 0, name
    for index, size in enumerate((16, 32)):
        common.queue_select = index
        assert (common.queue_size, common.queue_enable, common.queue_desc) == (size, 0, 0)


@pytest.mark.parametrize("size", [0, 3, 6, 12, 17, 31, 32, 64, 0x8000, 0xFFFF])
def test_a_queue_size_that_is_no_power_of_two_or_too_large_is_ignored(guest: Guest, size: int) -> None:
    common = negotiated(guest).common
    common.queue_size = 8
    common.queue_size = size
    assert common.queue_size == 8


def test_queue_enable_takes_1_only(guest: Guest) -> None:
    common = negotiated(guest).common
    for value in (0, 2, 0xFFFF):
        common.queue_enable = value
        assert common.queue_enable == 0
    common.queue_enable = 1
    common.queue_enable = 0
    assert common.queue_enable == 1


def test_an_enabled_queue_keeps_its_registers(guest: Guest) -> None:
    common = negotiated(guest).common
    common.queue_enable = 1
    before = common.bytes(0, 64)
    for name in QUEUE_REGISTERS:
        setattr(common, name, 2)
    assert common.bytes(0, 64) == before


def test_no_queue_register_changes_after_driver_ok(guest: Guest) -> None:
    """CVE-2026-5747: neither the queue in use nor the one that was left disabled."""
    pair = negotiated(guest)
    pair.set_up_queue(0, "firstq", pair.config_source)
    pair.status |= Status.DRIVER_OK
    for index in range(2):
        pair.common.queue_select = index
        before = pair.common.bytes(0, 64)
        for name in QUEUE_REGISTERS:
            setattr(pair.common, name, 2)
            setattr(pair.common, name, 1)
        assert pair.common.bytes(0, 64) == before


def test_queue_0_left_disabled_while_the_other_works(guest: Guest) -> None:
    pair = negotiated(guest)
    pair.queues = [pair.set_up_queue(1, "secondq", pair.config_source)]
    pair.notifiers = [pair.registers.notifier(0), pair.registers.notifier(1)]
    pair.status |= Status.DRIVER_OK
    window, offset = pair.notifiers[0]
    window.write(offset, 2, 0)
    buffer = pair.secondq.add(b"x")
    pair.secondq.kick()
    buffer.wait()
    assert pair.function.dataplane.notifiers.mode(0) == "-"


def enable(driver: VirtioDriver, desc: int, avail: int, used: int) -> None:
    driver.common.queue_desc, driver.common.queue_driver, driver.common.queue_device = desc, avail, used
    driver.common.queue_enable = 1


BAD_RINGS: dict[str, Callable[[Guest], tuple[int, int, int]]] = {
    "no addresses": lambda guest: (0, 0, 0),
    "desc unaligned": lambda guest: (0x10008, 0x11000, 0x12000),
    "avail unaligned": lambda guest: (0x10000, 0x11001, 0x12000),
    "used unaligned": lambda guest: (0x10000, 0x11000, 0x12002),
    "all the same": lambda guest: (0x10000, 0x10000, 0x10000),
    "avail in desc": lambda guest: (0x10000, 0x10010, 0x12000),
    "used in avail": lambda guest: (0x10000, 0x11000, 0x11004),
    "desc across the end of RAM": lambda guest: (sum(guest.ram[1]) - 16, 0x11000, 0x12000),
    "avail outside RAM": lambda guest: (0x10000, sum(guest.ram[1]), 0x12000),
    "used in a BAR": lambda guest: (0x10000, 0x11000, 0xE0000000),
    "used wraps": lambda guest: (0x10000, 0x11000, (1 << 64) - 4),
}


@pytest.mark.parametrize("rings", BAD_RINGS.values(), ids=BAD_RINGS)
def test_a_ring_that_cannot_be_one_breaks_the_device_at_driver_ok(
    guest: Guest, rings: Callable[[Guest], tuple[int, int, int]]
) -> None:
    other = guest.plug(Rng(source=bytes))
    pair = negotiated(guest)
    pair._set_up_msix()
    enable(pair, *rings(guest))
    assert Status.NEEDS_RESET not in pair.status
    with guest.only_writes():
        pair.status |= Status.DRIVER_OK
        pair.wait_needs_reset()
    assert Status.DRIVER_OK in pair.status
    assert guest.accel.ioeventfds.isdisjoint(pair.function.notify_addresses(0))
    pair.start()
    for driver, vq in ((pair, "firstq"), (other, "requestq")):
        buffer = getattr(driver, vq).add(writable=16)
        getattr(driver, vq).kick()
        buffer.wait()


def test_a_notify_before_driver_ok_consumes_nothing_and_is_served_afterwards(guest: Guest) -> None:
    rng = negotiated(guest, Rng(source=bytes))
    rng.set_up()
    buffer = rng.requestq.add(writable=16)
    rng.requestq.kick()
    rng.requestq.notify()
    assert rng.requestq.ring.used_idx == 0
    rng.status |= Status.DRIVER_OK
    assert buffer.wait() == bytes(16)


@pytest.mark.parametrize("transport", ["modern", "legacy"])
def test_a_notify_of_a_queue_that_does_not_exist_is_ignored(guest: Guest, transport: str) -> None:
    """CVE-2011-2512."""
    rng = guest.plug(Rng(source=bytes), transport=transport, page_per_vq=True)  # type: ignore[arg-type]
    window, offset = rng.notifiers[0]
    for index in (1, 2, 0x7FFF, 0xFFFF):
        window.write(offset if transport == "legacy" else offset + 4096 * min(index, 1), 2, index)
    buffer = rng.requestq.add(writable=16)
    rng.requestq.kick()
    assert buffer.wait() == bytes(16)


def test_a_notify_after_a_reset_is_ignored(guest: Guest) -> None:
    rng = guest.plug(Rng(source=bytes))
    ring, (window, offset) = rng.requestq.ring, rng.notifiers[0]
    rng.reset()
    ring.add([Desc(0x8000, 16, WRITE)])
    ring.publish()
    with guest.only_writes():
        window.write(offset, 2, 0)
    assert ring.used_idx == 0
    assert not rng.why_broken


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_notify_of_any_width_has_the_same_effect(guest: Guest, size: int) -> None:
    rng = guest.plug(Rng(source=bytes))
    buffer = rng.requestq.add(writable=16)
    rng.requestq.publish()
    rng.requestq.notify(size)
    assert buffer.wait() == bytes(16)


def test_the_value_written_to_a_modern_notify_register_does_not_matter(guest: Guest) -> None:
    pair = guest.plug(Pair())
    window, offset = pair.notifiers[1]
    buffer = pair.secondq.add(b"x")
    pair.secondq.publish()
    window.write(offset, 2, 0)
    buffer.wait()
