"""The balloon: pages that the guest gives up are free on the host, and nothing else is."""

import os
import struct
import threading

import pytest

from pyvirtio.devices.balloon import PAGE, PIECE, Balloon, BalloonConfig, Stat, runs
from pyvirtio.spec import Status
from pyvirtio.testing import Guest, VirtioDriver
from pyvirtio.testing.queue import HANG


def pages_held(guest: Guest) -> int:
    """How many pages of guest memory take room on the host."""
    _, _, fd, _ = guest.memory.regions[0]
    return os.fstat(fd).st_blocks * 512 // PAGE


def inflate(driver: VirtioDriver, *numbers: int) -> None:
    buffer = driver.inflateq.add(struct.pack(f"<{len(numbers)}I", *numbers))
    driver.inflateq.kick()
    buffer.wait()


def touched(guest: Guest, count: int) -> int:
    """The number of the first of some pages that the guest has written to."""
    start = guest.heap.allocate((count + 1) * PAGE) // PAGE + 1
    guest.memory.write(start * PAGE, b"\7" * (count * PAGE))
    return start


def test_pages_in_the_balloon_are_free_on_the_host(guest: Guest) -> None:
    driver = guest.plug(Balloon())
    first = touched(guest, 100)
    inflate(driver, touched(guest, 1))  # the rings are in use
    held = pages_held(guest)
    numbers = [*reversed(range(first, first + 50)), *range(first + 60, first + 80), first]
    buffer = driver.inflateq.add(struct.pack(f"<{len(numbers)}I", *numbers))
    with guest.only_writes((first * PAGE, 80 * PAGE), (driver.inflateq.ring.desc, driver.inflateq.ring.span)):
        driver.inflateq.kick()
        buffer.wait()
    assert held - pages_held(guest) == 70
    assert guest.memory.read(first * PAGE, PAGE) == bytes(PAGE)
    assert guest.memory.read((first + 50) * PAGE, PAGE) == b"\7" * PAGE


def test_a_deflated_page_is_memory_again(guest: Guest) -> None:
    driver = guest.plug(Balloon())
    page = touched(guest, 1)
    inflate(driver, page)
    buffer = driver.deflateq.add(struct.pack("<I", page))
    driver.deflateq.kick()
    assert buffer.wait() == b""
    guest.memory.write(page * PAGE, b"again")
    assert guest.memory.read(page * PAGE, 5) == b"again"


@pytest.mark.guest(transport=("modern", "legacy", "vhost-user"))
def test_memory_above_4_gib(guest: Guest) -> None:
    driver = guest.plug(Balloon())
    guest.memory.write(guest.high + PAGE, b"high")
    inflate(driver, guest.high // PAGE + 1)
    assert guest.memory.read(guest.high + PAGE, 4) == bytes(4)


@pytest.mark.parametrize("number", [0xFFFFFFFF, 1 << 19, (4 << 20) // PAGE])
def test_a_page_that_is_no_memory_breaks_the_device(guest: Guest, number: int) -> None:
    """In the hole, past the end, and with the largest number there is."""
    driver = guest.plug(Balloon())
    driver.inflateq.add(struct.pack("<I", number))
    driver.inflateq.kick()
    assert "guest memory" in driver.wait_needs_reset()
    driver.start()
    inflate(driver, touched(guest, 1))


def test_odd_messages(guest: Guest) -> None:
    """What is left over behind the last whole number says nothing; an empty message neither."""
    driver = guest.plug(Balloon())
    page = touched(guest, 2)
    buffers = [driver.inflateq.add(struct.pack("<I", page) + b"\1\2"), driver.inflateq.add(writable=8)]
    driver.inflateq.kick()
    assert [buffer.wait() for buffer in buffers] == [b"", b""]
    assert guest.memory.read((page + 1) * PAGE, 1) == b"\7"


def test_the_target_is_told_and_what_is_reached_too(guest: Guest) -> None:
    balloon = Balloon()
    driver = guest.plug(balloon)
    balloon.target = 1234
    assert driver.config.num_pages == 1234
    assert driver.config_interrupts == 1
    driver.config.actual = 1000
    assert balloon.actual == 1000
    driver.config.num_pages = 5
    assert balloon.target == 1234, "a driver writes actual only"
    driver.start()
    assert (balloon.actual, balloon.target) == (0, 1234)


def test_a_message_without_end_keeps_nobody_waiting(guest: Guest) -> None:
    """A driver may describe 2^32 bytes of page numbers: what is beyond the first ones stays with the guest."""
    driver = guest.plug(Balloon())
    first = touched(guest, 2)
    numbers = [first] * (PIECE // 4) + [first + 1]
    inflate(driver, *numbers)
    assert guest.memory.read(first * PAGE, 1) == bytes(1)
    assert guest.memory.read((first + 1) * PAGE, 1) == b"\7"


@pytest.mark.guest(transport=("modern", "legacy"))
def test_what_is_reached_may_be_told_byte_by_byte(guest: Guest) -> None:
    """Linux writes so through the legacy interface."""
    balloon = Balloon()
    driver = guest.plug(balloon)
    for index, byte in enumerate((0x12345).to_bytes(4, "little")):
        driver.config.write(BalloonConfig.actual.offset + index, 1, byte)
    assert balloon.actual == 0x12345


def stats(free: int) -> bytes:
    return struct.pack("<HQHQHQ", Stat.FREE_MEMORY, free, Stat.MAJOR_FAULTS, 3, 999, 1)


def give_stats(driver: VirtioDriver, *free: int) -> threading.Thread:
    """A driver that answers each returned buffer with the next message."""

    def answer() -> None:
        for number in free:
            buffer = driver.statsq.add(stats(number))
            driver.statsq.kick()
            if number != free[-1]:
                buffer.wait()

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


def test_statistics_are_those_of_now(guest: Guest) -> None:
    """The first buffer says what was when it was put there."""
    balloon = Balloon()
    driver = guest.plug(balloon)
    assert balloon.stats == {}
    thread = give_stats(driver, 1, 2, 3)
    assert balloon.ask_stats(HANG) == {"free-memory": 2, "major-faults": 3}
    thread.join()
    assert driver.function.dataplane.queues[2].in_flight == 0
    assert balloon.ask_stats() == {"free-memory": 2, "major-faults": 3}


def test_a_driver_without_statistics_is_not_waited_for(guest: Guest) -> None:
    balloon = Balloon()
    guest.plug(balloon)
    assert balloon.ask_stats(0.01) == {}


def test_reported_pages_are_free_on_the_host(guest: Guest) -> None:
    driver = guest.plug(Balloon(free_page_reporting=True))
    first = touched(guest, 8)
    buffer = driver.reporting_vq.add(writable=4 * PAGE + 100)
    (start, _), *_ = buffer.writable
    guest.memory.write(start, b"\7" * (4 * PAGE + 100))
    driver.reporting_vq.kick()
    buffer.wait()
    whole = (start + 4 * PAGE + 100) // PAGE - -(-start // PAGE)
    assert buffer.room.count(0) == whole * PAGE
    assert guest.memory.read(first * PAGE, 1) == b"\7"


def test_the_features_follow_the_properties() -> None:
    assert Balloon().device_features == 0x2
    assert Balloon(deflate_on_oom=True).device_features == 0x6
    assert Balloon(free_page_reporting=True).device_features == 0x22


def test_a_balloon_goes_on_elsewhere(guest: Guest) -> None:
    balloon = Balloon()
    driver = guest.plug(balloon)
    balloon.target = 77
    driver.config.actual = 70
    other = Balloon()
    driver.restore(other, driver.save())
    assert (other.target, other.actual) == (77, 70)
    inflate(driver, touched(guest, 3))
    assert Status.NEEDS_RESET not in driver.status


def test_runs() -> None:
    assert list(runs([])) == []
    assert list(runs([5])) == [(5, 1)]
    assert list(runs([1, 2, 3, 7, 9, 10])) == [(1, 3), (7, 1), (9, 2)]
