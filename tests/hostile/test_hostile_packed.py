"""What only a packed ring can say, and must not."""

import pytest
from attack import RING, Attack, Keeper, echo

from pyvirtio.testing import Guest
from pyvirtio.testing.packed import AT_DESC, AVAIL, DISABLE, USED
from pyvirtio.testing.ring import INDIRECT, NEXT, WRITE, Desc

pytestmark = pytest.mark.guest(transport=("modern", "vhost-user"))


@pytest.mark.parametrize("id_", [RING, RING + 1, 0x7FFF, 0x8000, 0xFFFF])
def test_a_buffer_id_past_the_ring(packed_ring: Attack, id_: int) -> None:
    packed_ring.ring.offer([Desc(packed_ring.buffer, 8, WRITE)], id_)
    packed_ring.breaks(f"buffer id {id_} is past")


def test_a_chain_longer_than_the_ring(packed_ring: Attack) -> None:
    for index in range(RING):
        packed_ring.ring.write_desc(index, Desc(packed_ring.buffer, 1, NEXT | AVAIL))
    packed_ring.breaks("longer than the ring")


@pytest.mark.parametrize("flags", [0, USED, AVAIL | USED])
def test_a_chain_whose_tail_is_not_available(packed_ring: Attack, flags: int) -> None:
    packed_ring.ring.write_desc(1, Desc(packed_ring.buffer, 8, WRITE | flags))
    packed_ring.ring.write_desc(0, Desc(packed_ring.buffer, 8, NEXT | AVAIL))
    packed_ring.breaks("descriptor 1 is not available")


@pytest.mark.parametrize("flags", [USED, AVAIL | USED, 0xFFFF & ~AVAIL, 0xFFFF])
def test_flags_of_no_lap_make_nothing_available(packed_ring: Attack, flags: int) -> None:
    for index in range(RING):
        packed_ring.ring.write_desc(index, Desc(packed_ring.buffer, 8, flags))
    with packed_ring.harmless():
        for _ in range(10):
            packed_ring.queue.notify()
    packed_ring.recovers()


def test_a_descriptor_of_all_ones(packed_ring: Attack) -> None:
    packed_ring.ring.write_desc(0, Desc((1 << 64) - 1, 0xFFFFFFFF, 0xFFFF & ~USED, 0xFFFF))
    packed_ring.breaks("echoq")


def test_a_table_with_next(packed_ring: Attack) -> None:
    packed_ring.place_indirect(Desc(packed_ring.buffer, 8, WRITE), flags=INDIRECT | NEXT)
    packed_ring.breaks("with a next descriptor")


def test_a_table_behind_other_descriptors(packed_ring: Attack) -> None:
    address, size = packed_ring.queue.place_table([Desc(packed_ring.buffer, 8, WRITE)])
    packed_ring.ring.offer([Desc(packed_ring.buffer, 8), Desc(address, size, INDIRECT)], 0)
    packed_ring.breaks("behind other descriptors")


def test_the_same_id_twice_in_a_batch_is_served_twice(packed_ring: Attack) -> None:
    for _ in range(2):
        packed_ring.place(Desc(packed_ring.buffer, 8, WRITE))
    assert packed_ring.is_served(times=2, writable=[(packed_ring.buffer, 8)]) == [8, 8]


def test_a_malformed_chain_behind_good_ones_takes_nothing_with_it(packed_ring: Attack) -> None:
    packed_ring.ring.offer([Desc(packed_ring.buffer, 4, WRITE)], 0)
    packed_ring.ring.offer([Desc(packed_ring.buffer + 64, 4, WRITE)], 99)
    with packed_ring.harmless([(packed_ring.buffer, 4)]):
        packed_ring.send()
        assert "buffer id 99" in packed_ring.driver.wait_needs_reset()
    assert packed_ring.guest.memory.read(packed_ring.buffer + 64, 4) != b"\xa5" * 4
    packed_ring.recovers()


@pytest.mark.parametrize("take", [False, True], ids=["left in the ring", "in flight"])
def test_a_lap_too_many_is_no_livelock(guest: Guest, event_idx: bool, take: bool) -> None:
    """CVE-2026-16457: what the device still has is made available again, and there is news for ever."""
    device = Keeper()
    driver = guest.plug(device, packed=True, event_idx=event_idx)
    ring = driver.requestq.ring
    for id_ in range(RING):
        ring.offer([Desc(0x1000, 8)], id_)
    ring.publish()
    if take:
        driver.requestq.notify()
        held = [device.take() for _ in range(RING)]
        assert len(held) == RING
    ring.write_flags(0, USED)
    driver.requestq.notify()
    if take:
        assert "more descriptors available or in flight than the ring has" in driver.wait_needs_reset()
        driver.start()


@pytest.mark.parametrize("value", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
@pytest.mark.parametrize("flags", [AT_DESC, 3, 0xFFFC])
def test_garbage_in_the_event_fields_costs_at_most_interrupts(packed_ring: Attack, value: int, flags: int) -> None:
    ring, q = packed_ring.ring, packed_ring.queue
    for round_ in range(3 * RING):
        ring.driver_event = value + round_
        ring.driver_flags = flags
        ring.device_event = value * 3
        buffer = q.add(b"x", 1)
        packed_ring.send()
        assert buffer.wait() == b"x"
    assert q.interrupts <= 3 * RING
    packed_ring.recovers()


def test_no_interrupt_is_sent_to_a_driver_that_wants_none(packed_ring: Attack) -> None:
    ring, q = packed_ring.ring, packed_ring.queue
    ring.expect_interrupt = lambda: setattr(ring, "driver_flags", DISABLE)
    ring.expect_interrupt()
    for _ in range(2 * RING):
        assert echo(q, b"abc") == b"abc"
    assert q.interrupts == 0
    packed_ring.recovers()


@pytest.mark.parametrize("flags", [0, AVAIL, USED, 0xFFFF])
def test_garbage_in_used_descriptors_changes_nothing(packed_ring: Attack, flags: int) -> None:
    """The device keeps its own place. What it has used is the driver's to scribble on."""
    ring = packed_ring.ring
    for n in range(3):
        echo(packed_ring.queue, b"%d" % n)
    for index in range(3):
        ring.write_desc(index, Desc(0, 0xFFFF, flags, 7))
    place = ring.next_used
    packed_ring.driver.may_break = True
    id_ = ring.add([Desc(packed_ring.buffer, 8, WRITE)])
    packed_ring.send()
    packed_ring.queue.wait_until(lambda: ring.read_desc(place.index).next == id_, "it is used")
    packed_ring.recovers()
