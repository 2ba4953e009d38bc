"""Malformed indirect tables."""

import pytest
from attack import RING, Attack

from pyvirtio.testing.ring import INDIRECT, NEXT, WRITE, Desc

pytestmark = pytest.mark.guest(transport=("modern", "vhost-user"))


def good(attack: Attack) -> Desc:
    return Desc(attack.buffer, 8, WRITE)


def test_a_table_without_the_feature(without_indirect: Attack) -> None:
    without_indirect.place_indirect(good(without_indirect))
    without_indirect.breaks("without VIRTIO_F_INDIRECT_DESC")


def test_a_table_in_a_table(either: Attack) -> None:
    inner, length = either.queue.place_table([good(either)])
    either.place_indirect(Desc(inner, length, INDIRECT))
    either.breaks("a table inside a table")


def test_a_table_in_a_table_behind_a_good_descriptor(either: Attack) -> None:
    inner, length = either.queue.place_table([good(either)])
    either.place_indirect(Desc(either.buffer, 4, NEXT, 1), Desc(inner, length, INDIRECT))
    either.breaks("a table inside a table")


def test_a_table_with_next(direct: Attack) -> None:
    direct.ring.write_desc(1, good(direct))
    direct.place_indirect(good(direct), flags=INDIRECT | NEXT)
    direct.breaks("with a next descriptor")


@pytest.mark.parametrize("length", [0, 1, 15, 17, 31, 0xFFFFFFFF])
def test_a_table_of_odd_length(either: Attack, length: int) -> None:
    either.place_indirect(good(either), length=length)
    either.breaks("multiple of 16")


@pytest.mark.parametrize("entries", [RING + 1, 4096, 0xFFFFFFF])
def test_a_table_of_more_entries_than_the_queue(either: Attack, entries: int) -> None:
    either.place_indirect(good(either), length=16 * entries)
    either.breaks(f"at most {RING}")


@pytest.mark.parametrize("address", [1 << 40, 0x80000000, (1 << 64) - 16, (1 << 64) - 8])
def test_a_table_outside_ram(either: Attack, address: int) -> None:
    either.offer(Desc(address, 32, INDIRECT))
    either.breaks("echoq")


def test_a_table_across_the_end_of_ram(either: Attack) -> None:
    start, size = either.guest.ram[2]
    either.guest.memory.write(start + size - 16, either.ring.table([Desc(either.buffer, 8, NEXT, 1)]))
    either.offer(Desc(start + size - 16, 32, INDIRECT))
    either.breaks("echoq")


@pytest.mark.guest(transport="modern")
@pytest.mark.parametrize("bar", [1, 4])
def test_a_table_in_a_bar(either: Attack, bar: int) -> None:
    either.offer(Desc(either.driver.pci.bars[bar].base, 16, INDIRECT))
    either.breaks("echoq")


def test_the_write_flag_on_the_table_is_ignored(either: Attack) -> None:
    either.place_indirect(good(either), flags=INDIRECT | WRITE)
    assert either.is_served(writable=[(either.buffer, 8)]) == [8]


@pytest.mark.parametrize("before", [8, 16, 24])
def test_a_table_across_the_border_of_two_regions_is_served(either: Attack, before: int) -> None:
    descs = either.ring.linked([Desc(either.buffer, 2), Desc(either.buffer, 2), Desc(either.buffer + 64, 4, WRITE)])
    address = either.guest.border - before
    either.guest.memory.write(address, either.ring.table(descs))
    either.offer(Desc(address, 48, INDIRECT))
    assert either.is_served(writable=[(either.buffer + 64, 4)]) == [4]


@pytest.mark.parametrize("offset", [1, 3, 8])
def test_an_unaligned_table_is_no_crash(either: Attack, offset: int) -> None:
    address = either.buffer + 1024 + offset
    either.guest.memory.write(address, either.ring.table([good(either)]))
    either.offer(Desc(address, 16, INDIRECT))
    either.survives(writable=[(either.buffer, 8)])


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_a_table_in_the_ring_itself_is_no_crash(direct: Attack, part: str) -> None:
    direct.ring.write_desc(1, good(direct))
    at = direct.ring.desc + 16 if part == "desc" else getattr(direct.ring, part)
    direct.ring.write_desc(0, Desc(at, 16, INDIRECT))
    direct.ring.offer(0)
    direct.survives(writable=[(direct.buffer, 8)])


def test_tables_and_plain_descriptors_in_one_batch(direct: Attack) -> None:
    direct.place_indirect(good(direct))
    direct.ring.write_desc(1, Desc(direct.buffer + 64, 4, WRITE))
    direct.ring.offer(1)
    assert direct.is_served(times=2, writable=[(direct.buffer, 128)]) == [8, 4]
