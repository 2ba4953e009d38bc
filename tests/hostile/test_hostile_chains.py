"""Malformed descriptor chains, directly in the ring and in an indirect table."""

import pytest
from attack import RING, Attack, Keeper

from pyvirtio.testing import Guest
from pyvirtio.testing.ring import NEXT, WRITE, Desc

pytestmark = pytest.mark.guest(transport=("modern", "vhost-user"))
ALL_ONES = (1 << 64) - 1


def test_a_descriptor_that_is_its_own_next(split: Attack) -> None:
    split.place(Desc(split.buffer, 16, NEXT, 0))
    split.breaks("longer than")


def test_a_loop_of_two(split: Attack) -> None:
    split.place(Desc(split.buffer, 16, NEXT, 1), Desc(split.buffer, 16, NEXT, 0))
    split.breaks("longer than")


def test_a_loop_that_starts_late(split: Attack) -> None:
    chain = [Desc(split.buffer, 1, NEXT, n + 1) for n in range(RING - 1)]
    split.place(*chain, Desc(split.buffer, 1, NEXT, 7))
    split.breaks("longer than")


def test_a_chain_as_long_as_the_queue_is_served(attack: Attack) -> None:
    chain = [Desc(attack.buffer, 1, NEXT, n + 1) for n in range(RING - 1)]
    attack.place(*chain, Desc(attack.buffer + 64, 4, WRITE))
    assert attack.is_served(writable=[(attack.buffer + 64, 4)]) == [4]


@pytest.mark.parametrize("index", [RING, RING + 1, 0x8000, 0xFFFF])
def test_a_next_past_the_table(split: Attack, index: int) -> None:
    split.place(Desc(split.buffer, 16, NEXT, index), Desc(split.buffer, 16))
    split.breaks(f"next {index} is past")


@pytest.mark.parametrize("head", [RING, RING + 1, 0x8000, 0xFFFF])
def test_a_head_past_the_table(direct: Attack, head: int) -> None:
    direct.ring.offer(head)
    direct.breaks(f"head {head} is past")


def test_a_descriptor_of_all_ones(split: Attack) -> None:
    split.place(Desc(ALL_ONES, 0xFFFFFFFF, 0xFFFF, 0xFFFF))
    split.breaks("echoq")


def test_the_same_head_twice_in_a_batch_is_served_twice(direct: Attack) -> None:
    direct.place(Desc(direct.buffer, 8, WRITE))
    direct.ring.offer(0)
    assert direct.is_served(times=2, writable=[(direct.buffer, 8)]) == [8, 8]


def test_a_descriptor_of_length_0(attack: Attack) -> None:
    attack.place(Desc(attack.buffer, 0, NEXT, 1), Desc(attack.buffer, 4, WRITE))
    attack.survives(writable=[(attack.buffer, 4)])


def test_a_chain_of_nothing(attack: Attack) -> None:
    attack.place(Desc(attack.buffer, 0))
    attack.survives()


@pytest.mark.parametrize("address", [1 << 40, ALL_ONES, 0xC0000000])
def test_length_0_at_an_address_that_does_not_exist(attack: Attack, address: int) -> None:
    attack.place(Desc(address, 0, WRITE))
    attack.survives()


@pytest.mark.parametrize("flags", [0, WRITE])
@pytest.mark.parametrize("address", [ALL_ONES, ALL_ONES - 15, ALL_ONES - 4096])
def test_address_and_length_wrap(attack: Attack, address: int, flags: int) -> None:
    attack.place(Desc(address, 0x2000, flags))
    attack.breaks("descriptor 0")


@pytest.mark.parametrize("flags", [0, WRITE])
@pytest.mark.parametrize("address", [1 << 40, 1 << 63, 0x80000000, 0xCF8])
def test_an_address_outside_ram_or_across_its_end(attack: Attack, address: int, flags: int) -> None:
    """The last of them is RAM that does not reach as far as the length does."""
    attack.place(Desc(address, 1 << 24, flags))
    attack.breaks("descriptor 0")


@pytest.mark.parametrize("flags", [0, WRITE])
@pytest.mark.parametrize("region", [1, 2])
def test_across_the_end_of_a_region_into_a_hole(attack: Attack, region: int, flags: int) -> None:
    start, size = attack.guest.ram[region]
    attack.place(Desc(start + size - 8, 16, flags))
    attack.breaks("descriptor 0")


@pytest.mark.guest(transport="modern")
@pytest.mark.parametrize("flags", [0, WRITE])
@pytest.mark.parametrize("bar", [1, 4])
def test_an_address_in_a_bar(attack: Attack, bar: int, flags: int) -> None:
    """CVE-2021-3748, CVE-2024-3446: the device would write to its own registers."""
    attack.place(Desc(attack.driver.pci.bars[bar].base, 64, flags))
    attack.breaks("descriptor 0")


def test_a_buffer_across_the_border_of_two_regions_is_served(attack: Attack) -> None:
    border = attack.guest.border
    attack.guest.memory.write(border - 8, bytes(16))
    attack.place(Desc(border - 8, 16, WRITE))
    assert attack.is_served(writable=[(border - 8, 16)]) == [16]
    assert attack.guest.memory.read(border - 8, 16) == b"\xa5" * 16


def test_a_buffer_above_4_gib_is_served(attack: Attack) -> None:
    attack.place(Desc(attack.guest.high, 16, WRITE))
    assert attack.is_served(writable=[(attack.guest.high, 16)]) == [16]


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_a_writable_buffer_in_the_ring_itself(attack: Attack, part: str) -> None:
    address = getattr(attack.ring, part)
    attack.place(Desc(address, 128, WRITE))
    attack.survives(writable=[(address, 128)])


def test_readable_after_writable(attack: Attack) -> None:
    attack.place(Desc(attack.buffer, 4, WRITE | NEXT, 1), Desc(attack.buffer + 64, 4))
    attack.breaks("readable buffer after")


def test_a_malformed_chain_behind_good_ones_takes_nothing_with_it(direct: Attack) -> None:
    """Never a silently shortened chain: what was complete is used, what is malformed is not."""
    direct.ring.write_desc(1, Desc(direct.buffer, 4, WRITE))
    direct.ring.write_desc(2, Desc(direct.buffer + 64, 4, WRITE | NEXT, 99))
    direct.ring.offer(1)
    direct.ring.offer(2)
    with direct.harmless([(direct.buffer, 4)]):
        direct.send()
        assert "next 99" in direct.driver.wait_needs_reset()
    assert direct.guest.memory.read(direct.buffer + 64, 4) != b"\xa5" * 4
    direct.recovers()


@pytest.mark.parametrize("how", ["address", "length", "flags", "next"])
def test_a_descriptor_rewritten_in_flight_is_one_snapshot(guest: Guest, event_idx: bool, how: str) -> None:
    """CVE-2020-14375: what was checked is what is used."""
    device = Keeper()
    driver = guest.plug(device, event_idx=event_idx)
    ring, target, elsewhere = driver.requestq.ring, guest.heap.allocate(64), guest.heap.allocate(64)
    good = Desc(target, 8, WRITE)
    ring.write_desc(0, good)
    ring.offer(0)
    ring.publish()
    driver.requestq.notify()
    chain = device.take()
    change = {"address": elsewhere, "length": 64, "flags": NEXT, "next": 5}
    ring.write_desc(0, good._replace(**{how: change[how]}))
    with guest.only_writes(ring.used_range, (target, 8)):
        assert chain.write(bytes(range(1, 65))) == 8
        chain.complete()
    assert guest.memory.read(target, 8) == bytes(range(1, 9))
    assert ring.used_element(0) == (0, 8)


def test_more_than_4_gib_in_one_chain(event_idx: bool) -> None:
    with Guest(memory=16 << 30) as guest:
        attack = Attack(guest, event_idx=event_idx)
        start, _ = attack.guest.ram[0]
        for index, desc in enumerate([Desc(start, 0xFFFFFFFF, WRITE | NEXT, 1), Desc(start, 1, WRITE)]):
            attack.ring.write_desc(index, desc)
        attack.ring.offer(0)
        attack.send()
        assert "2^32" in attack.driver.wait_needs_reset()
        attack.recovers()
